"""What happens if a run is resumed with other arguments."""

import json
import logging

import pytest
import torch
from torch.utils.data import IterableDataset

from fts.errors import ArgumentError, CheckpointError
from fts.loops import Position, load_extra
from fts.storage.manifest import write_manifest
from fts.trainer import TrainerCallback
from fts.trainer.checkpoints.argument_changes import IGNORED_ARGUMENTS, changed_arguments, seed_changes
from fts.trainer.checkpoints.epoch_layout import EpochLayout, convert_position
from tests.trainer.helpers import Linear, Regression, arguments, losses, make_trainer

ROWS = 24
SETTINGS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "logging_strategy": "no"}


def numbered(count=ROWS):
    return [{"x": torch.full((4,), float(i)), "labels": float(i)} for i in range(count)]


class Watching(Linear):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, labels=None):
        self.seen.extend(int(label) for label in labels.tolist())
        return super().forward(x, labels)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def run(directory, resume=None, stop=None, data=None, **changes):
    """Train; the examples that were seen, in order, and the trainer."""
    model = Watching()
    callbacks = [] if stop is None else [Stop(stop)]
    data = numbered() if data is None else data
    trainer = make_trainer(directory, model, train_dataset=data, callbacks=callbacks, **(SETTINGS | changes))
    trainer.train(resume_from_checkpoint=resume)
    return model.seen, trainer


# batch size and micro-batches


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    ],
)
def test_with_other_sizes_every_example_is_trained_on_once_an_epoch(tmp_path, changes):
    reference, _ = run(tmp_path / "reference", save_strategy="no")
    before, _ = run(tmp_path / "run", stop=2)  # 8 of 24 examples
    after, trainer = run(tmp_path / "run", resume=True, **changes)
    assert before == reference[:8]
    assert after == reference[8:]
    assert trainer.state.epoch == 2.0
    assert trainer.state.global_step == trainer.state.max_steps


def test_other_sizes_can_follow_other_sizes(tmp_path):
    reference, _ = run(tmp_path / "reference", save_strategy="no")
    seen, _ = run(tmp_path / "run", stop=2)
    seen += run(tmp_path / "run", resume=True, stop=6, per_device_train_batch_size=2)[0]
    seen += run(tmp_path / "run", resume=True, stop=8, per_device_train_batch_size=2)[0]
    assert seen == reference[:20]
    rest, trainer = run(tmp_path / "run", resume=True)
    assert seen + rest == reference
    assert trainer.state.epoch == 2.0


def test_at_the_end_of_an_epoch_any_size_fits(tmp_path):
    reference, _ = run(tmp_path / "reference", save_strategy="no")
    run(tmp_path / "run", save_steps=6, stop=6)
    after, trainer = run(tmp_path / "run", resume=True, save_steps=6, per_device_train_batch_size=7)
    assert after == reference[24:]
    assert trainer.state.global_step == 6 + 4


def test_a_place_that_the_new_sizes_cannot_name_is_an_error(tmp_path):
    run(tmp_path, stop=2)
    with pytest.raises(
        ArgumentError, match=r"epoch 0 after 8 examples.*per_device_train_batch_size=3.*divides 8.*end of an epoch"
    ):
        run(tmp_path, resume=True, per_device_train_batch_size=3)
    with pytest.raises(ArgumentError, match="per_device_train_batch_size=4 and gradient_accumulation_steps=1"):
        run(tmp_path, resume=True, gradient_accumulation_steps=4)


def test_max_steps_stays_what_it_is(tmp_path):
    run(tmp_path, max_steps=9, stop=2)
    after, trainer = run(tmp_path, resume=True, max_steps=9, per_device_train_batch_size=2)
    assert (trainer.state.global_step, len(after)) == (9, 14)


def test_a_changed_size_is_reported(tmp_path, caplog):
    run(tmp_path, stop=2)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, resume=True, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert "per_device_train_batch_size: 2 (from args) != 4 (from trainer_state.json)" in caplog.text
    assert "gradient_accumulation_steps: 2 (from args) != 1 (from training_args.json)" in caplog.text


def test_a_changed_number_of_examples_is_reported(tmp_path, caplog):
    run(tmp_path, stop=2)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, resume=True, data=numbered(28))
    assert "28 examples" in caplog.text
    assert "24" in caplog.text


class Stream(IterableDataset):
    def __iter__(self):
        return iter(numbered())


def test_streams_are_converted_unless_workers_divide_them(tmp_path):
    run(tmp_path, data=Stream(), max_steps=6, stop=2)
    after, _ = run(tmp_path, data=Stream(), max_steps=6, resume=True, per_device_train_batch_size=2)
    assert after == list(range(8, 16))
    with pytest.raises(ArgumentError, match="dataloader_num_workers=2"):
        run(tmp_path, data=Stream(), max_steps=9, resume=True, dataloader_num_workers=2)


def test_conversion():
    old = EpochLayout(batch_size=4, micro_batches=1, items=22)  # 6 steps
    for position in (Position(0, 0), Position(1, 3), Position(1, 6)):
        assert convert_position(position, old, old) == position
    new = EpochLayout(batch_size=2, micro_batches=2, items=22)
    assert convert_position(Position(1, 3), old, new) == Position(1, 3)
    new = EpochLayout(batch_size=2, micro_batches=1, items=22)
    assert convert_position(Position(1, 3), old, new) == Position(1, 6)
    assert convert_position(Position(1, 6), old, new) == Position(1, 11)
    assert convert_position(Position(1, 5), EpochLayout(4, 1, 22, drop_last=True), old) == Position(1, 6)
    with pytest.raises(ArgumentError):
        convert_position(Position(1, 1), old, EpochLayout(3, 1, 22))


# other arguments


def test_every_changed_argument_is_reported_with_who_wins(tmp_path, caplog):
    run(tmp_path, stop=2)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, resume=True, learning_rate=0.5, num_train_epochs=3, lr_scheduler_type="cosine")
    lines = [record.getMessage() for record in caplog.records]
    for line in (
        "learning_rate: 0.5 (from args) != 0.01 (from training_args.json)",
        "num_train_epochs: 3 (from args) != 2 (from training_args.json)",
        "lr_scheduler_type: cosine (from args) != linear (from training_args.json)",
    ):
        (found,) = (message for message in lines if message.startswith(line))
        assert "args win" in found


def test_each_argument_has_a_line_that_names_both_values(tmp_path):
    args = arguments(tmp_path)
    before = json.loads(json.dumps(args.to_dict(), default=str))
    assert len(before) > 100
    assert changed_arguments(args, before) == []
    for name in before.keys() - set(IGNORED_ARGUMENTS):
        (line,) = changed_arguments(args, before | {name: "another"})
        assert line == f"{name}: {before[name]} (from args) != another (from training_args.json)"
    for name in ("seed", "data_seed"):  # the only ones that a checkpoint wins
        (line,) = seed_changes(arguments(tmp_path, **{name: 7}), 42, 42)
        assert line.startswith(f"{name}: 7 (from args) != 42")


def test_a_stretched_schedule_is_said_with_its_rates(tmp_path, caplog):
    run(tmp_path, stop=2)
    with caplog.at_level(logging.WARNING):
        _, trainer = run(tmp_path, resume=True, num_train_epochs=4, logging_strategy="steps", logging_steps=1)
    assert "updates of the run: 24 (from args and data) != 12 (from trainer_state.json): args win" in caplog.text
    said = "learning rate at update 2: 0.00916667, by 24 updates, != 0.00833333, by 12: args win"
    assert said in caplog.text
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(0.00916667)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run(tmp_path, resume=True, num_train_epochs=5, lr_scheduler_type="constant")
    assert "updates of the run: 30" in caplog.text
    assert "learning rate at update" not in caplog.text


def test_another_number_of_processes_is_reported_and_the_position_is_converted(tmp_path, caplog):
    reference, _ = run(tmp_path / "reference", save_strategy="no")
    run(tmp_path / "run", stop=2)
    path = tmp_path / "run" / "checkpoint-2" / "progress.json"
    document = json.loads(path.read_text())
    document["extra"]["cut"]["processes"] = 2
    path.write_text(json.dumps(document))
    write_manifest(path.parent)
    with caplog.at_level(logging.WARNING):
        seen, trainer = run(tmp_path / "run", resume=True)
    assert (
        "processes: 1 (from this run) != 2 (from checkpoint); an update has 4 examples, where it had 8: this run wins"
        in caplog.text
    )
    assert seen == reference[16:]
    assert trainer.state.global_step == 2 + 2 + 6


def test_unchanged_arguments_are_not_reported(tmp_path, caplog):
    run(tmp_path, stop=2)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, resume=True)
    assert "from args" not in caplog.text


@pytest.mark.parametrize(("changes", "name"), [({"seed": 7}, "seed: 7"), ({"data_seed": 7}, "data_seed: 7")])
def test_a_run_keeps_the_seeds_that_it_began_with(tmp_path, caplog, changes, name):
    reference, uninterrupted = run(tmp_path / "reference", save_strategy="no")
    seen, _ = run(tmp_path / "run", stop=2)
    for stop in (4, None):  # the second time, training_args.json has the new seed and the run still the old one
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rest, trainer = run(tmp_path / "run", resume=True, stop=stop, **changes)
        seen += rest
        assert f"{name} (from args) != 42 (from checkpoint)" in caplog.text
        assert "the checkpoint wins" in caplog.text
        assert caplog.text.count("from args") == 1
    assert seen == reference
    assert torch.equal(trainer.model.w, uninterrupted.model.w)


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ({}, {"optim": "sgd"}, r"optim: sgd \(from args\) != adamw_torch"),
        ({"optim": "sgd", "max_grad_norm": 0.0}, {}, r"optim: adamw_torch .*max_grad_norm: 1.0"),
    ],
)
def test_another_optimizer_cannot_be_resumed_and_is_named(tmp_path, before, after, names):
    run(tmp_path, stop=2, **before)
    with pytest.raises(CheckpointError, match=names):
        run(tmp_path, resume=True, **after)


def test_both_kernels_of_adamw_resume_each_other(tmp_path):
    run(tmp_path, stop=2)
    assert run(tmp_path, resume=True, optim="adamw_torch_fused")[1].state.epoch == 2.0


def test_the_checkpoint_has_the_layout_of_the_epoch(tmp_path):
    run(tmp_path, stop=2, gradient_accumulation_steps=2)
    layout = load_extra(tmp_path / "checkpoint-2")["cut"]
    assert (layout["batch_size"], layout["micro_batches"], layout["items"]) == (4, 2, ROWS)


# What torch schedules and callbacks have made of the optimizer's settings


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


class Writes(TrainerCallback):
    """Writes settings at one step; `when` says at which event."""

    def __init__(self, when, **settings):
        self.settings = settings
        setattr(self, when, self._write)

    def _write(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 3:
            for group in optimizer.param_groups:
                group.update({name: value for name, value in self.settings.items() if name != "weight_decay"})
            optimizer.param_groups[0].update(self.settings)


def one_cycle(parameters):
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30)


def cyclic(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3)


def multi_step(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5, 5, 8], 0.5)


def tensor_rate(parameters):
    return torch.optim.AdamW(parameters, lr=torch.tensor(0.1)), None


@pytest.mark.parametrize("make", [one_cycle, cyclic, multi_step, tensor_rate])
def test_settings_of_torch_schedules_come_back(make, tmp_path):
    def trainer(folder, *callbacks):
        torch.manual_seed(0)
        model = Regression()
        options = {"num_train_epochs": 2, "logging_steps": 1, "optimizers": make(model.parameters())}
        return make_trainer(tmp_path / folder, model, callbacks=list(callbacks), **options)

    reference = trainer("reference")
    reference.train()
    trainer("parts", StopAt(4)).train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(reference)
    assert all(torch.equal(one, two) for one, two in zip(reference.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.parametrize("when", ["on_step_begin", "on_step_end"])
@pytest.mark.parametrize("settings", [{"lr": 0.5}, {"betas": (0.5, 0.6)}, {"weight_decay": 0.5}, {"lr": 0.2, "eps": 1e-3}])
def test_what_callbacks_wrote_comes_back(settings, when, tmp_path):
    def trainer(folder, *callbacks):
        torch.manual_seed(0)
        return make_trainer(tmp_path / folder, Regression(), num_train_epochs=2, logging_steps=1, callbacks=list(callbacks))

    reference, plain = trainer("reference", Writes(when, **settings)), trainer("plain")
    reference.train(), plain.train()
    trainer("parts", Writes(when, **settings), StopAt(3 if when == "on_step_end" else 5)).train()
    resumed = trainer("parts")  # without the callback, whose work is done
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(reference) != losses(plain)


def test_a_run_that_begins_where_another_saved_warns(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, max_steps=6, **options).train()
    assert "another one" not in caplog.text
    (tmp_path / "checkpoint-9").mkdir()  # not a checkpoint
    make_trainer(tmp_path, max_steps=2, **options).train()
    (warned,) = [record.message for record in caplog.records if "is a new run" in record.message]
    assert f"output_dir={str(tmp_path)!r} has checkpoints of another one: checkpoint-2, checkpoint-4, checkpoint-6." in warned
    assert "Until this run has saved a step beyond 6, resume_from_checkpoint=True takes checkpoint-6" in warned
    caplog.clear()
    make_trainer(tmp_path, max_steps=6, **options).train(resume_from_checkpoint=True)
    assert "is a new run" not in caplog.text
