import logging
from pathlib import Path

import numpy as np
import pytest

from fts.errors import ArgumentError, CheckpointError
from fts.trainer import EarlyStoppingCallback, ExportableState, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from fts.trainer.callbacks import export_callbacks, restore_callbacks
from tests.trainer.helpers import make_trainer

transformers = pytest.importorskip("transformers")


class Kept(TrainerCallback, ExportableState):
    """A callback with a state."""

    def __init__(self, name="default"):
        self.name = name
        self.seen = 0

    def state(self):
        return {"args": {"name": self.name}, "attributes": {"seen": self.seen}}


class Theirs(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):
    """The same, on transformers' bases."""

    __init__, state = Kept.__init__, Kept.state


@pytest.mark.parametrize("kind", [EarlyStoppingCallback, transformers.EarlyStoppingCallback])
def test_attributes_survive_and_arguments_stay(kind):
    stopper = kind(3)
    stopper.early_stopping_patience_counter = 2
    states = export_callbacks([stopper, PrinterCallback()])
    callbacks = [fresh := kind(5)]
    restore_callbacks(callbacks, states)
    assert callbacks[0] is fresh
    assert (fresh.early_stopping_patience, fresh.early_stopping_patience_counter) == (5, 2)


@pytest.mark.parametrize("kind", [Kept, Theirs])
def test_arguments_come_from_the_checkpoint_if_asked(kind):
    first, second = kind("foo"), kind("bar")
    first.seen = 7
    states = export_callbacks([first, PrinterCallback(), second, TrainerControl(should_save=True)])
    assert [state["args"]["name"] for state in states[kind.__name__]] == ["foo", "bar"]
    assert states["TrainerControl"]["args"]["should_save"]
    callbacks = [old := kind(), printer := PrinterCallback(), kind()]
    restore_callbacks(callbacks, states, arguments=True)
    assert [type(callback) for callback in callbacks] == [kind, PrinterCallback, kind]
    assert [(callbacks[index].name, callbacks[index].seen) for index in (0, 2)] == [("foo", 7), ("bar", 0)]
    assert callbacks[1] is printer and callbacks[0] is not old


def test_files_of_transformers_are_read(tmp_path):
    stopper = transformers.EarlyStoppingCallback(3)
    stopper.early_stopping_patience_counter = 2
    control = transformers.TrainerControl()
    transformers.TrainerState(stateful_callbacks=[stopper, control]).save_to_json(str(tmp_path / "state.json"))
    callbacks = [EarlyStoppingCallback()]
    restore_callbacks(callbacks, TrainerState.load_from_json(tmp_path / "state.json").stateful_callbacks, arguments=True)
    assert (callbacks[0].early_stopping_patience, callbacks[0].early_stopping_patience_counter) == (3, 2)


def test_an_unrelated_method_is_no_state():
    class Machine(TrainerCallback):
        def state(self, which):
            raise AssertionError

    assert export_callbacks([Machine()]) == {}


def test_states_are_copies_of_plain_values():
    kept = Kept()
    kept.seen = np.int64(3)
    kept.name = names = ["a"]
    states = export_callbacks([kept])
    names.append("b")
    assert states == {"Kept": {"args": {"name": ["a"]}, "attributes": {"seen": 3}}}
    assert type(states["Kept"]["attributes"]["seen"]) is int


def test_states_that_cannot_be_saved():
    with pytest.raises(ArgumentError, match=r"Kept\.state\(\) returned what JSON cannot hold \(.*PosixPath"):
        export_callbacks([Kept(Path("here"))])

    class Odd(Kept):
        def state(self):
            return [1]

    with pytest.raises(ArgumentError, match=r"Odd\.state\(\) returned \[1\]; it must return"):
        export_callbacks([Odd()])


class Sees(TrainerCallback, ExportableState):
    """Has a state that becomes one which JSON cannot hold."""

    def __init__(self, at=0):
        self.at, self.seen = at, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.seen = {1} if self.at and state.global_step >= self.at else state.global_step

    def state(self):
        return {"args": {"at": self.at}, "attributes": {"seen": self.seen}}


def test_a_state_that_cannot_be_saved_ends_a_run_before_it_begins(tmp_path):
    callback = Sees()
    callback.seen = {1}
    options = {"callbacks": [callback], "max_steps": 3}
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3, **options)
    with pytest.raises(ArgumentError, match=r"Sees\.state\(\) returned what JSON cannot hold \(\{1\} is a set"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert make_trainer(tmp_path, **options).train().global_step == 3  # which writes no checkpoint


@pytest.mark.parametrize("arguments", [False, True])
def test_a_state_that_can_no_longer_be_saved_costs_no_checkpoint(arguments, tmp_path, caplog):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": arguments}
    callbacks = [Sees(), Sees(3), Sees()]
    make_trainer(tmp_path, callbacks=callbacks, **options).train()
    assert "without the state of a callback, which starts anew on resume. Sees.state() returned what" in caplog.text
    callbacks = [Sees(), Sees(), Sees()]
    trainer = make_trainer(tmp_path, callbacks=callbacks, **options)
    trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-6")
    found = [callback for callback in trainer.callback_handler.callbacks if type(callback) is Sees]
    assert [callback.seen for callback in found] == [6, 0, 6]


def test_states_without_a_callback_are_named(caplog):
    states = export_callbacks([Kept(), Kept(), EarlyStoppingCallback(), TrainerControl()])
    with caplog.at_level(logging.WARNING):
        restore_callbacks([Kept(), EarlyStoppingCallback()], states)
        restore_callbacks([Kept(), Kept(), EarlyStoppingCallback()], states)
    assert [record.getMessage() for record in caplog.records] == [
        "The checkpoint has states of callbacks that this run does not have; they are not used: Kept."
    ]


def test_states_that_cannot_be_restored():
    states = {"Kept": {"args": {"title": "x"}, "attributes": {}}}
    with pytest.raises(CheckpointError, match=r"Kept cannot be restored: .*title.*restore_callback_states_from_checkpoint=False"):
        restore_callbacks([Kept()], states, arguments=True)
    restore_callbacks([Kept()], states)
    with pytest.raises(CheckpointError, match="Kept cannot be restored"):
        restore_callbacks([Kept()], {"Kept": "corrupt"})
