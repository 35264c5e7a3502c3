import logging

import pytest

from fts.errors import ArgumentError
from fts.trainer import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from fts.trainer.callbacks import EVENTS, export_callbacks, restore_callbacks
from tests.trainer.helpers import Linear, make_trainer, rows


def recorder(base=object):
    class Recorder(base):
        def __init__(self):
            self.events = []

    def record(event):
        def method(self, args, state, control, **kwargs):
            assert kwargs.keys() >= {
                "model",
                "processing_class",
                "optimizer",
                "lr_scheduler",
                "train_dataloader",
                "eval_dataloader",
            }
            extra = next((kwargs[name] for name in ("logs", "metrics") if name in kwargs), None)
            self.events.append(
                event if extra is None else f"{event}:{'loss' if 'loss' in extra else 'eval' if 'eval_loss' in extra else 'end'}"
            )

        return method

    for event in EVENTS:
        setattr(Recorder, event, record(event.removeprefix("on_")))
    return Recorder()


def test_events_come_in_the_documented_order(tmp_path):
    seen = recorder()
    trainer = make_trainer(
        tmp_path,
        Linear(),
        16,
        num_train_epochs=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=2,
        per_device_eval_batch_size=5,
        callbacks=[seen],
    )
    trainer.train()
    update = ["step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "log:loss"]
    evaluation = ["prediction_step", "prediction_step", "log:eval", "evaluate:eval"]
    assert seen.events == [
        *("init_end", "train_begin", "epoch_begin"),
        *update,
        *update,
        *("save", "epoch_end"),
        *evaluation,
        *("log:end", "train_end"),
    ]
    seen.events.clear()
    trainer.predict(rows(5))
    assert seen.events == ["prediction_step", "predict:end"]


def test_callbacks_written_for_transformers_work(tmp_path):
    base = pytest.importorskip("transformers").TrainerCallback
    seen = recorder(base)

    class Partial(base):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2
            return control

    trainer = make_trainer(tmp_path, callbacks=[seen, Partial])
    assert trainer.train().global_step == 2
    assert seen.events.count("step_end") == 2
    # what Partial does not override is not called
    assert len(trainer.callback_handler.listeners["on_step_begin"]) == 1


def test_a_callback_can_ask_for_everything(tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = state.global_step == 1
            control.should_evaluate = state.global_step == 2
            control.should_save = state.global_step == 3
            control.should_epoch_stop = state.global_step == 4

    trainer = make_trainer(tmp_path, num_train_epochs=2, logging_strategy="no", callbacks=[Ask])
    trainer.train()
    history = trainer.state.log_history
    assert [(entry["step"], "loss" in entry) for entry in history if "train_loss" not in entry] == [(1, True), (2, False)]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.state.global_step == 12  # max_steps stays; the second epoch begins early, and a third follows
    assert trainer.state.epoch == pytest.approx(2 + 2 / 6)


def test_a_returned_control_replaces_the_old_one(tmp_path):
    class Replace(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return TrainerControl(should_training_stop=True)

    trainer = make_trainer(tmp_path, callbacks=[Replace])
    assert trainer.train().global_step == 1


def test_the_list_of_callbacks(tmp_path, caplog):
    class Mine(TrainerCallback):
        pass

    trainer = make_trainer(tmp_path, callbacks=[Mine])
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [DefaultFlowCallback, Mine, PrinterCallback]
    shown = make_trainer(tmp_path, disable_tqdm=False).callback_handler.callbacks
    assert [type(callback) for callback in shown] == [DefaultFlowCallback, ProgressCallback]
    with caplog.at_level(logging.WARNING):
        trainer.add_callback(Mine())
    assert "Mine" in caplog.text
    first = trainer.pop_callback(Mine)
    assert isinstance(first, Mine)
    trainer.remove_callback(Mine)
    assert trainer.pop_callback(Mine) is None
    with pytest.raises(ArgumentError, match="int is no callback"):
        trainer.add_callback(3)


def test_a_callback_that_is_added_while_training_is_told(tmp_path):
    late = recorder()

    class Add(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.add_callback(late)

    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[Add])
    trainer.train()
    assert late.events.count("step_end") == 2
    assert late.events.count("step_begin") == 2


def test_progress_bars_appear(tmp_path, capsys):
    make_trainer(tmp_path, disable_tqdm=False, max_steps=6, logging_steps=2, eval_strategy="steps", eval_steps=3).train()
    shown = capsys.readouterr()
    assert "train: 100%" in shown.err
    assert "6/6" in shown.err
    assert "evaluate:" in shown.err
    assert "loss=" in shown.err
    assert "'eval_loss'" in shown.out + shown.err


def test_printing_instead_of_bars(tmp_path, capsys):
    make_trainer(tmp_path, max_steps=2, logging_steps=1).train()
    shown = capsys.readouterr()
    assert "'learning_rate'" in shown.out
    assert "%" not in shown.err


def test_states_of_callbacks_survive(tmp_path):
    stopper = EarlyStoppingCallback(3)
    stopper.early_stopping_patience_counter = 2
    states = export_callbacks([stopper, PrinterCallback()])
    fresh = EarlyStoppingCallback(5)
    restore_callbacks([fresh], states)
    assert (fresh.early_stopping_patience, fresh.early_stopping_patience_counter) == (5, 2)


@pytest.mark.parametrize(("values", "stops"), [([3, 2, 1, 0], []), ([1, 2, 3, 0], [2]), ([3.0, 2.95, 2.9, 1.0], [2])])
def test_early_stopping_counts(values, stops):
    args = TrainingArguments(metric_for_best_model="loss", eval_strategy="epoch")
    stopper, state, stopped = EarlyStoppingCallback(2, early_stopping_threshold=0.2), TrainerState(), []
    for number, value in enumerate(values):
        control = TrainerControl()
        stopper.on_evaluate(args, state, control, metrics={"eval_loss": value})
        state.best_metric = value if state.best_metric is None else min(value, state.best_metric)
        if control.should_training_stop:
            stopped.append(number)
    assert stopped[:1] == stops
