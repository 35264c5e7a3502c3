"""When and how checkpoints are written: asynchronously, by the clock, at a limit of time, after an error."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from fts import loops
from fts.errors import ArgumentError, CallbackError, CheckpointError, Interrupted
from fts.trainer import TrainerCallback, TrainingArguments
from fts.trainer.arguments import training_arguments
from tests.trainer.helpers import Regression, make_examples, make_trainer


def names(root):
    return sorted(path.name for path in root.glob("checkpoint-*"))


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name not in ("training_args.json", "manifest.json")}


def test_checkpoints_are_the_same_beside_training_or_not(tmp_path):
    for background in (True, False):
        torch.manual_seed(0)
        options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "async_save": background, "logging_steps": 1}
        make_trainer(tmp_path / str(background), Regression(), **options, skip_memory_metrics=True).train()
    one, two = tmp_path / "True", tmp_path / "False"
    assert names(one) == names(two) == ["checkpoint-16", "checkpoint-18"]
    for name in names(one):
        loops.verify_checkpoint(one / name)
        written, expected = files(one / name), files(two / name)
        assert written.keys() == expected.keys()
        assert [key for key in written if written[key] != expected[key] and key != "trainer_state.json"] == []


def test_beside_training_means_on_another_thread(tmp_path, monkeypatch, caplog):
    threads = []
    real = loops.rotate_checkpoints
    monkeypatch.setattr(
        loops, "rotate_checkpoints", lambda *args, **options: threads.append(threading.current_thread()) or real(*args, **options)
    )
    with caplog.at_level(logging.INFO, "fts"):
        make_trainer(tmp_path, Regression(), save_strategy="epoch").train()
    assert len(threads) == 3
    assert threading.main_thread() not in threads
    assert len(re.findall(r"from a copy of the state: \d+ MiB", caplog.text)) == 1
    threads.clear()
    make_trainer(tmp_path, Regression(), save_strategy="epoch", async_save=False).train()
    assert set(threads) == {threading.main_thread()}


def test_a_callback_finds_the_checkpoint_in_its_place(tmp_path):
    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            loops.verify_checkpoint(tmp_path / f"checkpoint-{state.global_step}")
            self.seen = state.global_step

    look = Look()
    make_trainer(tmp_path, Regression(), save_strategy="epoch", callbacks=[look]).train()
    assert look.seen == 18


def test_a_disk_error_ends_the_run_at_the_next_step_with_its_cause(tmp_path, monkeypatch):
    from fts.loops import async_checkpointer

    def full(*args):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(tmp_path, Regression(), save_strategy="steps", save_steps=3)
    calls = []
    real = async_checkpointer.commit
    monkeypatch.setattr(
        async_checkpointer, "commit", lambda *args: calls.append(1) or (real(*args) if len(calls) == 1 else full())
    )
    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written: .*No space left on device.*Free disk space"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-3"]
    assert 6 < trainer.state.global_step <= 9
    loops.verify_checkpoint(tmp_path / "checkpoint-3")


def test_saving_by_the_clock_is_independent_of_steps(tmp_path, monkeypatch):
    now = [0.0]
    timer = loops.every_interval
    monkeypatch.setattr(loops, "every_interval", lambda interval, **options: timer(interval, clock=lambda: now[0], **options))

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            now[0] += 60.0  # each step takes a minute

    def saved(**options):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        make_trainer(root, Regression(), count=40, num_train_epochs=1, callbacks=[Clock()], **options).train()
        return names(root)

    assert saved(save_every="4min") == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]  # the last step, too
    assert saved(save_every="4min", save_strategy="steps", save_steps=7) == ["checkpoint-10", "checkpoint-4", "checkpoint-7"]
    assert saved(save_strategy="steps", save_steps=7) == ["checkpoint-10", "checkpoint-7"]  # and at the end


SCRIPT = """
import pathlib, sys, time
import torch
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Regression, make_trainer

class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.05)

torch.manual_seed(0)
options = {"max_time": sys.argv[2], "num_train_epochs": 1000, "callbacks": [Slow()]}
trainer = make_trainer(pathlib.Path(sys.argv[1]), Regression(), **options)
trainer.train()
print("never")
"""


def test_a_time_limit_saves_and_ends_the_process_with_a_status_of_its_own(tmp_path):
    start = time.monotonic()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "0.5s"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 75, done.stderr
    assert "never" not in done.stdout
    assert time.monotonic() - start >= 0.5
    (name,) = names(tmp_path)
    loops.verify_checkpoint(tmp_path / name)
    assert int(name.removeprefix("checkpoint-")) < 6000


def test_a_run_that_is_done_in_time_ends_as_usual(tmp_path):
    assert make_trainer(tmp_path, Regression(), max_time="1 hour").train().global_step == 18


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("save_every", "often", "save_every='often': 'often' is not a duration"),
        ("save_every", 0, "save_every=0 must be a duration above 0"),
        ("max_time", -1, "max_time=-1: -1 is not a duration"),
        ("nonfinite", "panic", "nonfinite='panic' is unknown. Use one of 'raise', 'skip', 'rollback', 'ignore'"),
        ("nonfinite_limit", 0, "nonfinite_limit=0 must be a whole number of at least 1"),
        ("async_save", "yes", "async_save='yes' must be True or False"),
    ],
)
def test_errors(name, value, words):
    with pytest.raises(ArgumentError, match=re.escape(words)):
        TrainingArguments(**{name: value})


def test_times_of_a_command_line():
    transformers = pytest.importorskip("transformers")
    parser = transformers.HfArgumentParser(training_arguments.TrainingArguments)
    command = ["--save_every", "20min", "--max_time", "90", "--async_save", "False", "--nonfinite", "skip"]
    (args,) = parser.parse_args_into_dataclasses(command)
    assert (args.save_every, args.max_time, args.async_save, args.nonfinite) == ("20min", 90.0, False, "skip")


class Failing(torch.utils.data.Dataset):
    def __init__(self, bad):
        self.data, self.bad = make_examples(22), bad

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == self.bad:
            raise LookupError("row 13 has no label")
        return self.data[index]


def test_an_error_in_the_data_leaves_a_checkpoint_of_the_last_update(tmp_path):
    options = {"train_sampling_strategy": "sequential", "num_train_epochs": 1}
    trainer = make_trainer(tmp_path, Regression(), train_dataset=Failing(13), save_strategy="steps", save_steps=100, **options)
    with pytest.raises(LookupError, match="row 13 has no label") as caught:
        trainer.train()
    notes = "\n".join(caught.value.__notes__)
    assert "After step 3, before epoch 0, batch 3 (from 0), examples 12, 13, 14, 15 of the data." in notes
    assert "A checkpoint of step 3 was written" in notes
    torch.manual_seed(0)
    resumed = make_trainer(tmp_path, Regression(), save_strategy="steps", save_steps=100, **options)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6


def test_an_error_without_a_checkpoint_is_still_the_one_that_is_raised(tmp_path, monkeypatch):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                monkeypatch.setattr(loops.AsyncCheckpointer, "save", full)
                raise KeyError("accuracy")

    def full(*args, **kwargs):
        raise CheckpointError("the disk is full")

    with pytest.raises(CallbackError, match="accuracy") as caught:
        make_trainer(tmp_path, Regression(), callbacks=[Fails()]).train()
    assert "No checkpoint of step 2 could be written: CheckpointError: the disk is full" in caught.value.__notes__


def test_a_run_keeps_what_it_writes_where_another_left_later_steps(tmp_path):
    make_trainer(tmp_path, Regression(), save_strategy="steps", save_steps=9).train()
    assert names(tmp_path) == ["checkpoint-18", "checkpoint-9"]
    make_trainer(tmp_path, Regression(), save_strategy="steps", save_steps=2, max_steps=4, save_total_limit=1).train()
    assert "checkpoint-4" in names(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"save_strategy": "steps", "save_steps": 100}, ["checkpoint-4"]),
        ({"save_strategy": "epoch"}, ["checkpoint-4"]),
        ({"save_strategy": "no", "save_every": "1h"}, ["checkpoint-4"]),
        ({"save_strategy": "no"}, []),
    ],
    ids=str,
)
def test_the_last_step_is_saved_where_a_callback_stops_the_run(tmp_path, options, expected):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    make_trainer(tmp_path, Regression(), callbacks=[Stop()], **options).train()
    assert names(tmp_path) == expected


def test_a_signal_after_the_last_update_saves_too(tmp_path, caplog):
    class Ask(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 18:
                os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(Interrupted):
        make_trainer(tmp_path, Regression(), logging_steps=18, callbacks=[Ask()]).train()
    assert names(tmp_path) == ["checkpoint-18"]
    assert f"Stopped by SIGUSR1 after step 18; {tmp_path / 'checkpoint-18'} is written: train(resume" in caplog.text


def test_max_time_counts_from_the_beginning_of_train(tmp_path):
    def model_init():
        time.sleep(0.3)
        return Regression()

    options = {"model_init": model_init, "max_time": 0.2, "num_train_epochs": 100}
    with pytest.raises(Interrupted, match="max_time stopped the run"):
        make_trainer(tmp_path, **options).train()
    assert names(tmp_path) == ["checkpoint-1"]


def test_an_evaluation_before_training_is_left_as_well(tmp_path):
    class Ask(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            self.count = getattr(self, "count", 0) + 1
            os.kill(os.getpid(), signal.SIGUSR1)

    ask = Ask()
    with pytest.raises(Interrupted):
        make_trainer(tmp_path, Regression(), callbacks=[ask], eval_on_start=True, per_device_eval_batch_size=2).train()
    assert (ask.count, names(tmp_path)) == (1, [])


def test_a_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    class Move(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            os.chdir(tmp_path / "elsewhere")

    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}
    make_trainer("run", Regression(), callbacks=[Move()], **options).train()
    assert names(tmp_path / "run")
    assert not list((tmp_path / "elsewhere").iterdir())


def metrics_of(trainer):
    return [
        {key: value for key, value in entry.items() if not key.endswith(("_runtime", "_per_second"))}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_log", "on_prediction_step"])
@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau"])
def test_a_run_that_failed_in_a_callback_resumes_as_if_it_had_not(tmp_path, event, schedule):
    class Fails(TrainerCallback):
        pass

    def fail(self, args, state, control, **kwargs):
        if state.global_step == 7 or (event != "on_step_end" and state.global_step == 8):
            raise OSError("the tracker is gone")

    setattr(Fails, event, fail)

    def trainer(root, *callbacks):
        torch.manual_seed(0)
        options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "logging_steps": 3}
        settings = {"lr_scheduler_type": schedule, "metric_for_best_model": "loss", "callbacks": list(callbacks)}
        if schedule != "linear":
            settings["lr_scheduler_kwargs"] = {"patience": 0, "factor": 0.5}
        return make_trainer(root, Regression(), **options, **settings)

    with pytest.raises(CallbackError):
        trainer(tmp_path / "run", Fails()).train()
    resumed, reference = trainer(tmp_path / "run"), trainer(tmp_path / "reference")
    resumed.train(resume_from_checkpoint=True)
    reference.train()
    assert metrics_of(resumed) == metrics_of(reference)
    for one, two in zip(resumed.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_another_runs_checkpoint_is_not_taken_for_the_rescued_one(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyError("accuracy")

    torch.manual_seed(1)
    make_trainer(tmp_path, Regression(), save_strategy="steps", save_steps=6, max_steps=6).train()
    torch.manual_seed(2)
    trainer = make_trainer(tmp_path, Regression(), callbacks=[Fails()], seed=7, learning_rate=0.1)
    with pytest.raises(CallbackError):
        trainer.train()
    found = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_run_that_saves_models_alone_keeps_what_it_can_resume_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    make_trainer(tmp_path, max_steps=6, **options).train()
    make_trainer(tmp_path, max_steps=12, save_only_model=True, **options).train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-12"}
    assert make_trainer(tmp_path, max_steps=15, **options).train(resume_from_checkpoint=True).global_step == 15
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-15"}
