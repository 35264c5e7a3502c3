"""What the progress display shows, and when it is closed."""

import sys

import pytest

from fts.errors import MissingDependencyError
from fts.trainer import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments
from fts.trainer.callbacks import close_bars
from fts.trainer.callbacks.displays import LineDisplay
from tests.trainer.helpers import arguments, make_trainer

transformers = pytest.importorskip("transformers")


@pytest.fixture
def terminal(monkeypatch):
    """As in a terminal; `test_displays.py` has a real one."""
    monkeypatch.setattr("fts.trainer.callbacks.displays.in_terminal", lambda: True)


def begun(state, args=None, **options):
    shown = ProgressCallback(**options)
    shown.on_train_begin(args, state, None)
    return shown


def test_progress_bars_appear(tmp_path, capsys, terminal):
    make_trainer(tmp_path, disable_tqdm=False, max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=3).train()
    shown = capsys.readouterr()
    assert "train: 100%" in shown.err
    assert "6/6" in shown.err
    assert "evaluate:" in shown.err
    assert "examples/s, loss " in shown.err
    assert "grad_norm " in shown.err
    assert "'eval_loss'" in shown.out
    assert "'train_loss'" in shown.out


def test_lines_appear_where_there_is_no_terminal(tmp_path, capsys):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, disable_tqdm=False, max_steps=6, logging_steps=2, **settings).train()
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        *("train 2/6 (33%)", "train 3/6 (50%)", "train 4/6 (66%)", "train 6/6 (100%)", "train 6/6 (100%)", "train 6/6 (100%)"),
    ]
    assert all(part in lines[-1] for part in ("examples/s", "loss ", "lr ", "grad_norm ", "eval_loss ", " at 6", "saved at 6"))
    assert "saved at 4" in lines[3]
    assert "\r" not in shown.err + shown.out and "\x1b" not in shown.err + shown.out
    assert sum(line.startswith("{'") for line in shown.out.splitlines()) == 6


def test_the_speed_counts_the_examples_of_all_data_parallel_ranks(monkeypatch, terminal):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    state = TrainerState(max_steps=3, train_batch_size=8)
    tensor_parallel, split = {"parallelism_config": {"tp_size": 4}}, {"accelerator_config": {"split_batches": True}}
    for more, examples in (({}, 64), (tensor_parallel, 16), (split, 16)):
        args = TrainingArguments(use_cpu=True, gradient_accumulation_steps=2, **more)
        shown = begun(state, args)
        assert shown.training_bar.progress.examples_per_step == examples
        close_bars([shown])


def test_nothing_but_logs_without_it(tmp_path, capsys):
    make_trainer(tmp_path, disable_tqdm=True, max_steps=4, logging_steps=2).train()
    shown = capsys.readouterr()
    assert shown.err == ""
    assert all(line.startswith("{'") for line in shown.out.splitlines())


def test_transformers_own_callback_shows_bars(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2, callbacks=[transformers.ProgressCallback])
    trainer.train()
    trainer.evaluate()
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    assert "'learning_rate'" in shown.out + shown.err


def test_the_bar_of_a_resumed_run_continues_at_its_step(terminal):
    state = TrainerState(global_step=40, max_steps=100)
    shown = begun(state)
    assert (shown.training_bar.n, shown.training_bar.total, shown.training_bar.initial) == (40, 100, 40)
    state.global_step = 45
    shown.on_step_end(None, state, None)
    assert shown.training_bar.n == 45
    # the time left counts the 5 updates of this run, not all 45
    fields = shown.training_bar.format_dict
    line = shown.training_bar.format_meter(**(fields | {"elapsed": 10.0, "rate": None, "ncols": 80}))
    assert "45/100 [00:10<01:50" in line
    shown.on_train_end(None, state, None)
    assert shown.training_bar is None


def test_the_speed_is_that_of_this_run(monkeypatch):
    state = TrainerState(global_step=40, max_steps=100, train_batch_size=4)
    shown = begun(state, arguments("unused", gradient_accumulation_steps=2))
    assert isinstance(shown.training_bar, LineDisplay)
    state.global_step = 45
    shown.on_step_end(None, state, None)
    now = shown.training_bar.progress.start
    monkeypatch.setattr("fts.trainer.callbacks.progress_state.time.monotonic", lambda: now + 10.0)
    # 5 updates of 8 examples in 10 seconds, and 55 are left
    assert shown.training_bar.progress.line() == "train 45/100 (45%), 4 examples/s, 0:00:10 so far, 0:01:50 left"


def test_a_minute_without_logs_has_a_line(monkeypatch, capsys):
    state = TrainerState(max_steps=1000)
    shown = begun(state)
    now = shown.training_bar.progress.start
    for step in range(1, 200):
        monkeypatch.setattr("fts.trainer.callbacks.displays.time.monotonic", lambda step=step: now + step)
        state.global_step = step
        shown.on_step_end(None, state, None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["train 61/1000", "train 121/1000", "train 181/1000"]


def test_evaluations_have_a_bar_inside(terminal):
    state = TrainerState(max_steps=10)
    shown = begun(state)
    for _ in range(2):
        shown.on_prediction_step(None, state, None, eval_dataloader=[1, 2, 3])
    inner = shown.prediction_bar
    assert (inner.n, inner.total, inner.leave) == (2, 3, False)
    assert inner.pos != shown.training_bar.pos
    shown.on_evaluate(None, state, None)
    assert inner.disable and shown.prediction_bar is None
    shown.on_train_end(None, state, None)
    shown.on_prediction_step(None, state, None, eval_dataloader=iter([1]))  # alone, and of unknown length
    assert (shown.prediction_bar.total, shown.prediction_bar.leave) == (None, True)
    shown.on_predict(None, state, None)
    assert shown.prediction_bar is None


def test_logs_are_printed_above_the_bars(capsys, terminal):
    state = TrainerState(max_steps=10)
    shown = begun(state, max_str_len=4)
    shown.on_prediction_step(None, state, None, eval_dataloader=[1])
    logs = {"loss": 0.123456, "learning_rate": 5e-05, "text": "abcdefgh", "total_flos": 1.0}
    shown.on_log(None, state, None, logs=logs)
    assert shown.prediction_bar is None
    assert "loss 0.1235, lr 5e-05" in str(shown.training_bar)
    assert capsys.readouterr().out == "{'loss': '0.1235', 'learning_rate': '5e-05', 'text': 'abcd… (8 characters)'}\n"
    assert logs["loss"] == 0.123456 and "total_flos" in logs
    close_bars([shown])


def test_the_latest_evaluation_and_checkpoint_stay_in_view(terminal):
    state = TrainerState(max_steps=10, global_step=4)
    args = arguments("unused", metric_for_best_model="f1")
    shown = begun(state, args)
    shown.on_evaluate(args, state, None, metrics={"eval_loss": 0.5, "eval_f1": 0.25})
    shown.on_save(args, state, None)
    assert "eval_f1 0.25 at 4, saved at 4" in str(shown.training_bar)
    close_bars([shown])


def test_a_display_does_not_make_the_run_wait_for_its_checkpoints(tmp_path, monkeypatch):
    from fts.loops import AsyncCheckpointer

    waits = []
    wait = AsyncCheckpointer.wait
    monkeypatch.setattr(AsyncCheckpointer, "wait", lambda self: (waits.append(sys._getframe(1).f_code.co_name), wait(self))[1])

    class Reads(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            pass

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": False}
    make_trainer(tmp_path / "a", **settings).train()
    alone = waits.count("_dispatch_other")
    make_trainer(tmp_path / "b", **settings, callbacks=[Reads]).train()
    assert (alone, waits.count("_dispatch_other")) == (0, 2)


def test_short_texts_and_numbers_are_shown_as_transformers_does(capsys):
    logs = {"loss": 0.123456, "epoch": 1.0, "name": "run", "step": 3, "total_flos": 5.0}
    printed = []
    for kind in (ProgressCallback, transformers.ProgressCallback):
        shown = kind(max_str_len=3)
        shown.on_train_begin(None, TrainerState(max_steps=3), None)
        shown.on_log(None, TrainerState(), None, logs=dict(logs))
        printed.append(capsys.readouterr().out)
        close_bars([shown])
    assert printed[0] == printed[1]


def test_other_processes_show_nothing(capsys):
    state = TrainerState(max_steps=2, is_world_process_zero=False)
    shown = begun(state)
    shown.on_step_end(None, state, None)
    shown.on_prediction_step(None, state, None, eval_dataloader=[1])
    shown.on_evaluate(None, state, None, metrics={"eval_loss": 1.0})
    shown.on_save(None, state, None)
    shown.on_log(None, state, None, logs={"loss": 1.0})
    shown.on_train_end(None, state, None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [ProgressCallback, transformers.ProgressCallback])
def test_bars_are_closed_after_an_exception(kind, terminal):
    shown = kind()
    shown.on_train_begin(None, TrainerState(max_steps=3), None)
    shown.on_prediction_step(None, TrainerState(), None, eval_dataloader=[1])
    bars = [shown.training_bar, shown.prediction_bar]
    close_bars([TrainerCallback(), shown])
    assert all(bar.disable for bar in bars)  # tqdm's mark of a closed bar
    assert shown.training_bar is shown.prediction_bar is None


def test_a_run_that_fails_closes_its_bars(tmp_path):
    class Fails(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            raise KeyError

    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = make_trainer(tmp_path, disable_tqdm=False, **settings)
    shown = trainer.callback_handler.callbacks[-1]
    trainer.add_callback(Fails)
    with pytest.raises(KeyError):
        trainer.train()
    assert shown.training_bar is shown.prediction_bar is None


def test_a_new_run_closes_the_bars_of_an_old_one(terminal):
    state = TrainerState(max_steps=3)
    shown = begun(state)
    old = shown.training_bar
    shown.on_train_begin(None, state, None)
    assert old.disable and shown.training_bar is not old
    close_bars([shown])


def test_without_tqdm_the_remedy_is_named(monkeypatch, terminal):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingDependencyError, match=r"needs tqdm: pip install .* disable_tqdm=True"):
        begun(TrainerState())


def test_a_log_file_needs_no_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    state = TrainerState(max_steps=2)
    begun(state).on_log(None, state, None, logs={"loss": 1.0})
    assert "train 0/2 (0%)" in capsys.readouterr().err
