import logging
import re

import pytest
import torch

import fts
from fts.errors import ArgumentError, CallbackError
from fts.trainer import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from fts.trainer.callbacks import EVENTS
from tests.trainer.helpers import Linear, make_trainer

transformers = pytest.importorskip("transformers")

FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class Record(TrainerCallback):
    """Keeps what two events were given."""

    def __init__(self):
        self.given = []

    def on_step_end(self, args, state, control, **kwargs):
        self.given.append((args, state, control, kwargs))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.given.append((args, state, control, {"logs": logs} | kwargs))


def call(handler, event, control=None, **kwargs):
    return getattr(handler, event)("args", TrainerState(), control or TrainerControl(), **kwargs)


def test_the_handler_is_made_as_transformers_makes_it():
    seen = Record()
    handler = CallbackHandler([DefaultFlowCallback, seen], "model", "processor", "optimizer", "schedule")
    handler.train_dataloader, handler.eval_dataloader = "train", "eval"
    assert handler.callbacks[1] is seen
    assert handler.callback_list == "DefaultFlowCallback\nRecord"
    call(handler, "on_log", logs={"loss": 1.0})
    assert seen.given[0][3] == {
        "logs": {"loss": 1.0},
        "model": "model",
        "processing_class": "processor",
        "optimizer": "optimizer",
        "lr_scheduler": "schedule",
        "train_dataloader": "train",
        "eval_dataloader": "eval",
    }
    handler.context = {"model": "other"}
    handler.pop_callback(DefaultFlowCallback)
    assert handler.call_event("on_step_end", "args", "state", "control", metrics={"loss": 2.0}) == "control"
    args, state, control, kwargs = seen.given[1]
    assert (args, state, control) == ("args", "state", "control")
    assert (kwargs["model"], kwargs["metrics"]) == ("other", {"loss": 2.0})


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_clears_the_flags_that_transformers_clears(event):
    extra = {"logs": {}} if event == "on_log" else {"metrics": {}} if event in ("on_evaluate", "on_predict") else {}
    theirs = transformers.trainer_callback.CallbackHandler([transformers.trainer_callback.DefaultFlowCallback], *[None] * 4)
    ours = CallbackHandler([DefaultFlowCallback], *[None] * 4)
    # with both flows silent, what is left of the flags is the handler's work
    theirs.callbacks, ours.callbacks = [], []
    wanted, found = TrainerControl(*[True] * 5), TrainerControl(*[True] * 5)
    assert call(ours, event, found, **extra) is found
    call(theirs, event, wanted, **extra)
    assert [getattr(found, flag) for flag in FLAGS] == [getattr(wanted, flag) for flag in FLAGS]


def test_the_handler_has_transformers_surface():
    theirs = {name for name in dir(transformers.trainer_callback.CallbackHandler) if not name.startswith("_")}
    assert theirs <= set(dir(CallbackHandler([DefaultFlowCallback])))


def test_an_event_that_no_callback_overrides_calls_nothing():
    handler = CallbackHandler([DefaultFlowCallback(), transformers.trainer_callback.PrinterCallback(), Record()])
    assert handler.listeners["on_substep_end"] == handler.listeners["on_prediction_step"] == ()
    assert [type(listener).__name__ for listener in handler.listeners["on_log"]] == ["PrinterCallback", "Record"]


def test_a_callback_can_request_every_action(tmp_path):
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
    assert trainer.state.global_step == 10  # the second epoch begins early, and no third follows
    assert trainer.state.epoch == pytest.approx(2.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_seen_before_the_update(accumulate, tmp_path):
    class Freeze(TrainerCallback):
        def __init__(self):
            self.norms, self.substeps, self.reported = [], 0, []

        def on_substep_end(self, args, state, control, **kwargs):
            self.substeps += 1

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
            model.w.grad[:2] = 0.0

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            assert model.w.grad is None

        def on_step_end(self, args, state, control, metrics=None, **kwargs):
            self.reported.append(metrics["grad_norm"].item())

    seen = Freeze()
    options = {"gradient_accumulation_steps": accumulate, "num_train_epochs": 1, "callbacks": [seen]}
    trainer = make_trainer(tmp_path, Linear(), **options)
    trainer.train()
    assert trainer.model.w[:2].tolist() == [0.0, 0.0]
    assert trainer.model.w[2:].ne(0).all()
    assert all(norm >= reported > 0 for norm, reported in zip(seen.norms, seen.reported, strict=True))
    assert len(seen.norms) == trainer.state.global_step
    assert seen.substeps == (3 if accumulate == 2 else 0)


def test_a_returned_control_replaces_the_old_one(tmp_path):
    class Replace(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return TrainerControl(should_training_stop=True)

    trainer = make_trainer(tmp_path, callbacks=[Replace])
    assert trainer.train().global_step == 1


def test_something_else_returned_is_an_error():
    class Wrong(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            return True

    with pytest.raises(CallbackError, match=r"Wrong\.on_log returned True; it must return nothing, or a control object"):
        call(CallbackHandler([DefaultFlowCallback, Wrong]), "on_log", logs={})


def test_the_list_of_callbacks(tmp_path, caplog):
    class Mine(TrainerCallback):
        pass

    trainer = make_trainer(tmp_path, callbacks=[Mine])
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [DefaultFlowCallback, Mine, PrinterCallback]
    shown = make_trainer(tmp_path, disable_tqdm=False).callback_handler.callbacks
    assert [type(callback) for callback in shown] == [DefaultFlowCallback, ProgressCallback]
    with caplog.at_level(logging.WARNING):
        trainer.add_callback(Mine())
    assert str(Mine) in caplog.text
    first = trainer.pop_callback(Mine)
    assert isinstance(first, Mine)
    trainer.remove_callback(Mine)
    assert trainer.pop_callback(Mine) is None
    trainer.remove_callback(Mine)
    with pytest.raises(
        ArgumentError, match=r"There is no such callback to remove: .*Mine.* DefaultFlowCallback, PrinterCallback"
    ):
        trainer.remove_callback(first)
    with pytest.raises(ArgumentError, match="int is no callback"):
        trainer.add_callback(3)


@pytest.mark.parametrize("ours", [DefaultFlowCallback, PrinterCallback, ProgressCallback, EarlyStoppingCallback])
def test_a_class_imported_from_transformers_names_ours(ours, caplog):
    theirs = getattr(transformers.trainer_callback, ours.__name__)

    class Mine(ours):
        pass

    handler = CallbackHandler([DefaultFlowCallback, Mine])
    with caplog.at_level(logging.WARNING):
        handler.add_callback(theirs)
    assert str(theirs) in caplog.text
    assert isinstance(handler.pop_callback(handler.callbacks[-1]), theirs)
    handler.callbacks = [Mine()]
    assert handler.pop_callback(type(ours.__name__, (), {})) is None  # a user's own class of that name is another one
    assert isinstance(handler.pop_callback(theirs), Mine)


def test_a_class_that_needs_arguments():
    class Needs(TrainerCallback):
        def __init__(self, path):
            self.path = path

    with pytest.raises(ArgumentError, match=r"Needs cannot be created without arguments .*path.*: give an instance"):
        CallbackHandler([Needs])
    assert len(CallbackHandler([Needs("here")]).callbacks) == 1


def test_misspelt_events_are_found(caplog):
    class Wrong(TrainerCallback):
        on_disk = True

        def on_step_ends(self, args, state, control, **kwargs):
            pass

        def on_quux(self):
            pass

    with caplog.at_level(logging.WARNING):
        CallbackHandler([DefaultFlowCallback, Wrong])
    assert "Wrong.on_step_ends is never called: there is no such event. Did you mean on_step_end?" in caplog.text
    assert "Wrong.on_quux is never called: there is no such event. The events are: on_init_end, " in caplog.text
    assert "on_disk" not in caplog.text


def test_no_default_flow_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        CallbackHandler([DefaultFlowCallback])
        CallbackHandler([transformers.trainer_callback.DefaultFlowCallback])
        assert not caplog.text
        CallbackHandler([PrinterCallback])
    assert "No callback is a DefaultFlowCallback" in caplog.text


def test_a_callback_that_is_added_during_training_is_called(tmp_path):
    late = Record()

    class Add(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                trainer.add_callback(late)

    trainer = make_trainer(tmp_path, max_steps=4, logging_strategy="no", callbacks=[Add])
    trainer.train()
    assert [state.max_steps for _, state, _, kwargs in late.given if "logs" not in kwargs] == [4, 4]


def test_the_list_may_be_changed_in_place():
    seen = Record()
    handler = CallbackHandler([DefaultFlowCallback])
    handler.callbacks.append(seen)
    call(handler, "on_log", logs={})
    handler.callbacks.remove(seen)
    call(handler, "on_log", logs={})
    handler.callbacks = [seen]
    call(handler, "on_log", logs={})
    assert len(seen.given) == 2


def test_methods_may_be_replaced_between_runs(monkeypatch):
    handler, calls = CallbackHandler([Record]), []
    monkeypatch.setattr(Record, "on_epoch_end", lambda *args, **kwargs: calls.append("epoch"), raising=False)
    monkeypatch.setattr(Record, "on_log", lambda *args, **kwargs: calls.append("log"))
    call(handler, "on_train_begin")
    call(handler, "on_log", logs={})
    call(handler, "on_epoch_end")
    assert calls == ["log", "epoch"]


def test_events_of_ones_own():
    class Extra(TrainerCallback):
        def on_pruned(self, args, state, control, **kwargs):
            control.should_save = True

    handler = CallbackHandler([DefaultFlowCallback, Extra])
    assert handler.call_event("on_pruned", None, None, TrainerControl()).should_save


def test_metrics_reach_on_step_end():
    seen = Record()
    handler = CallbackHandler([seen])
    call(handler, "on_step_end", metrics={"loss": 0.5, "mine": 1})
    assert seen.given[0][3]["metrics"] == {"loss": 0.5, "mine": 1}


def test_what_a_callback_raises_names_it(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyError("accuracy")

    trainer = make_trainer(tmp_path, callbacks=[Fails])
    with pytest.raises(
        fts.errors.CallbackError, match=re.escape("Fails.on_step_end failed at step 2: KeyError: 'accuracy'")
    ) as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_stay_what_they_are(kind):
    class Stops(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            raise kind

    with pytest.raises(kind) as caught:
        call(CallbackHandler([DefaultFlowCallback, Stops]), "on_log", logs={})
    assert type(caught.value) is kind


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step"])
def test_a_learning_rate_set_before_the_update_is_that_of_the_update(event, tmp_path):
    class Write(TrainerCallback):
        pass

    rates = []

    def write(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 1:
            for group in optimizer.param_groups:
                group["lr"] = 0.25

    def note(self, args, state, control, metrics=None, **kwargs):
        rates.append(round(float(metrics["lr"]), 6))

    setattr(Write, event, write)
    Write.on_step_end = note
    make_trainer(tmp_path, Linear(), max_steps=3, lr_scheduler_type="constant", callbacks=[Write()]).train()
    assert rates == [0.01, 0.25, 0.01]


def written(name, value):
    def write(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            setattr(model, name, value(model)) if name == "w" else value(model)

    return type("Write", (TrainerCallback,), {"on_step_end": write})()


def test_weights_that_a_callback_replaces_are_trained_on(tmp_path):
    def exchange(model):
        model.w.data = torch.full((4,), 7.0)

    trainer = make_trainer(tmp_path, Linear(), max_steps=3, learning_rate=1e-6, callbacks=[written("data", exchange)])
    trainer.train()
    torch.testing.assert_close(trainer.model.w.detach(), torch.full((4,), 7.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("w", lambda model: torch.nn.Parameter(model.w.detach() * 2), "The Parameter 'w' was replaced"),
        ("frozen", lambda model: model.w.requires_grad_(False), "requires_grad of 'w' was set to False"),
    ],
)
def test_changes_that_a_running_step_cannot_follow_are_errors(name, value, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        make_trainer(tmp_path, Linear(), max_steps=4, callbacks=[written(name, value)]).train()


def test_a_learning_rate_of_one_group_alone_is_an_error(tmp_path):
    class Write(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer.param_groups[1]["lr"] = 0.5

    with pytest.raises(ArgumentError, match="one lr for all groups"):
        make_trainer(tmp_path, max_steps=2, callbacks=[Write()]).train()
