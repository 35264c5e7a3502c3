import inspect
import re

import pytest

from fts.trainer import TrainerCallback
from fts.trainer.callbacks import EVENTS, overrides
from tests.trainer.helpers import Linear, make_examples, make_trainer

CONTEXT = {"model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"}


def recorder(base=object):
    class Recorder(base):
        def __init__(self):
            self.events = []

    def record(event):
        def method(self, args, state, control, **kwargs):
            assert kwargs.keys() >= CONTEXT
            extra = kwargs.get("logs", kwargs.get("metrics") if event in ("evaluate", "predict") else None)
            kind = None if extra is None else "loss" if "loss" in extra else "eval" if "eval_loss" in extra else "end"
            self.events.append(event if kind is None else f"{event}:{kind}")

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
    trainer.predict(make_examples(5))
    assert seen.events == ["prediction_step", "predict:end"]


def test_events_are_those_of_transformers():
    theirs = pytest.importorskip("transformers").TrainerCallback
    names = {name for name, _ in inspect.getmembers(theirs, inspect.isfunction) if name.startswith("on_")}
    assert set(EVENTS) == names
    assert {name for name in vars(TrainerCallback) if name.startswith("on_")} == names


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


def test_a_base_class_of_the_same_name_is_no_empty_one():
    def on_log(self, args, state, control, **kwargs):
        return control

    on_log.__qualname__ = "TrainerCallback.on_log"
    own = type("TrainerCallback", (TrainerCallback,), {"on_log": on_log})
    assert overrides(own(), "on_log")
    assert not overrides(own(), "on_save")
    assert not overrides(TrainerCallback(), "on_log")


def test_the_documentation_lists_every_keyword():
    documented = set(re.findall(r"`(\w+)`", inspect.getdoc(TrainerCallback)))
    assert documented >= CONTEXT | {"logs", "metrics", "control"}
