import pytest

from fts.errors import MissingDependencyError
from fts.trainer import ProgressCallback, TrainerCallback, TrainerState
from fts.trainer.callbacks import close_bars
from tests.trainer.helpers import make_trainer

transformers = pytest.importorskip("transformers")


def begun(state, **options):
    shown = ProgressCallback(**options)
    shown.on_train_begin(None, state, None)
    return shown


def test_progress_bars_appear(tmp_path, capsys):
    make_trainer(tmp_path, disable_tqdm=False, max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=3).train()
    shown = capsys.readouterr()
    assert "train: 100%" in shown.err
    assert "6/6" in shown.err
    assert "evaluate:" in shown.err
    assert "loss=" in shown.err
    assert "'eval_loss'" in shown.out + shown.err
    assert "'train_loss'" in shown.out + shown.err


def test_transformers_own_callback_shows_bars(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2, callbacks=[transformers.ProgressCallback])
    trainer.train()
    trainer.evaluate()
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    assert "'learning_rate'" in shown.out + shown.err


def test_a_resumed_bar_goes_on_where_it_was():
    state = TrainerState(global_step=40, max_steps=100)
    shown = begun(state)
    assert (shown.training_bar.n, shown.training_bar.total, shown.training_bar.initial) == (40, 100, 40)
    state.global_step = 45
    shown.on_step_end(None, state, None)
    assert shown.training_bar.n == 45
    # the time left counts the 5 updates of this run, not all 45
    figures = shown.training_bar.format_dict
    line = shown.training_bar.format_meter(**(figures | {"elapsed": 10.0, "rate": None, "ncols": 80}))
    assert "45/100 [00:10<01:50" in line
    shown.on_train_end(None, state, None)
    assert shown.training_bar is None


def test_evaluations_have_a_bar_inside():
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


def test_logs_stand_above_the_bars(capsys):
    state = TrainerState(max_steps=10)
    shown = begun(state, max_str_len=4)
    shown.on_prediction_step(None, state, None, eval_dataloader=[1])
    logs = {"loss": 0.123456, "learning_rate": 5e-05, "text": "abcdefgh", "total_flos": 1.0}
    shown.on_log(None, state, None, logs=logs)
    assert shown.prediction_bar is None
    assert "loss=0.1235" in shown.training_bar.postfix and "lr=5e-05" in shown.training_bar.postfix
    assert capsys.readouterr().out == "{'loss': '0.1235', 'learning_rate': '5e-05', 'text': 'abcd… (8 characters)'}\n"
    assert logs["loss"] == 0.123456 and "total_flos" in logs
    close_bars([shown])


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
    shown.on_log(None, state, None, logs={"loss": 1.0})
    shown.on_train_end(None, state, None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [ProgressCallback, transformers.ProgressCallback])
def test_bars_are_closed_after_an_exception(kind):
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


def test_a_new_run_closes_what_an_old_one_left():
    state = TrainerState(max_steps=3)
    shown = begun(state)
    old = shown.training_bar
    shown.on_train_begin(None, state, None)
    assert old.disable and shown.training_bar is not old
    close_bars([shown])


def test_without_tqdm_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(MissingDependencyError, match=r"needs tqdm: pip install .* disable_tqdm=True"):
        begun(TrainerState())
