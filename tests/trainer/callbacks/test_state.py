import datetime
import json
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fts.errors import ArgumentError, CheckpointError
from fts.trainer import EarlyStoppingCallback, ExportableState, PrinterCallback, TrainerControl, TrainerState

transformers = pytest.importorskip("transformers")


def test_fields_and_defaults_are_those_of_transformers():
    assert asdict(TrainerState()) == asdict(transformers.TrainerState())
    assert [item.name for item in fields(TrainerState)] == [item.name for item in fields(transformers.TrainerState)]
    assert asdict(TrainerControl()) == asdict(transformers.TrainerControl())
    public = {name for name in dir(transformers.TrainerState()) if not name.startswith("_")}
    assert public <= set(dir(TrainerState()))
    private = {"_new_training", "_new_epoch", "_new_step"}
    assert private | {"state", "from_state"} <= set(dir(TrainerControl()))


@pytest.mark.parametrize("writer", [TrainerState, transformers.TrainerState])
@pytest.mark.parametrize("reader", [TrainerState, transformers.TrainerState])
def test_files_are_read_by_both(writer, reader, tmp_path):
    state = writer(epoch=1.5, global_step=6, log_history=[{"loss": 0.5, "step": 6}], trial_params={"lr": 0.1}, best_metric=0.25)
    state.save_to_json(str(tmp_path / "state.json"))
    assert asdict(reader.load_from_json(str(tmp_path / "state.json"))) == asdict(state)


def test_unknown_keys_are_left_out(tmp_path):
    document = asdict(TrainerState(global_step=3)) | {"total_energy": 3}
    del document["trial_name"]
    (tmp_path / "state.json").write_text(json.dumps(document))
    assert TrainerState.load_from_json(tmp_path / "state.json") == TrainerState(global_step=3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"global_step": "3"}, "global_step is '3'; it must be a whole number"),
        ({"global_step": True}, "global_step is True"),
        ({"epoch": None}, "epoch is None; it must be a number"),
        ({"log_history": {}}, "log_history is {}; it must be a list"),
        ({"best_metric": "good"}, "best_metric is 'good'; it must be a number"),
        ({"best_global_step": 1.5}, "best_global_step is 1.5; it must be a whole number"),
        ({"best_model_checkpoint": 5}, "best_model_checkpoint is 5; it must be a string"),
        ({"stateful_callbacks": []}, "stateful_callbacks is"),
    ],
)
def test_corrupt_files_are_errors(change, text, tmp_path):
    (tmp_path / "state.json").write_text(json.dumps(asdict(TrainerState()) | change))
    with pytest.raises(CheckpointError, match=f"is corrupt: {text}"):
        TrainerState.load_from_json(tmp_path / "state.json")


@pytest.mark.parametrize("text", ["", "[]", '{"epoch": 1', "[" * 100_000])
def test_files_that_are_no_state(text, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        TrainerState.load_from_json(tmp_path / "missing.json")
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be read|holds list"):
        TrainerState.load_from_json(tmp_path / "state.json")


def test_metrics_of_other_libraries_are_written_as_numbers(tmp_path):
    history = [{"a": np.float32(0.5), "b": torch.tensor(2), "c": np.arange(2)}]
    TrainerState(log_history=history).save_to_json(tmp_path / "state.json")
    assert TrainerState.load_from_json(tmp_path / "state.json").log_history == [{"a": 0.5, "b": 2, "c": [0, 1]}]


def test_logs_that_json_cannot_hold_are_saved_as_strings_and_warned_of_once(tmp_path, caplog):
    when, circle = datetime.datetime(2026, 11, 26), []
    circle.append(circle)
    entries = [{"when": when, "step": 7}, {("a", 1): 2, "b": {("c",): 1}}, "x", {3, 4}, {"loss": 0.5, "me": circle}]
    state = TrainerState(log_history=list(entries))
    state.save_to_json(tmp_path / "state.json")
    texts = [{"when": str(when), "step": 7}, {"('a', 1)": 2, "b": "{('c',): 1}"}, "x", {"text": "{3, 4}"}]
    texts.append({"loss": 0.5, "me": "[[...]]"})
    assert TrainerState.load_from_json(tmp_path / "state.json").log_history == state.log_history == texts
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 5
    assert warned[0].startswith("The log history has 'when': datetime.datetime(2026, 11, 26, 0, 0), which JSON cannot hold")
    state.save_to_json(tmp_path / "state.json")
    assert len(caplog.records) == 5
    with pytest.raises(CheckpointError, match=r"cannot be written: .*set.* Give it numbers and strings only"):
        TrainerState(trial_params={"a": {1}}).save_to_json(tmp_path / "state.json")


@pytest.mark.parametrize(("steps", "most"), [((3, 4, 5), 10), ((0.1, 0.25, 0.5), 10), ((0.1, None, 0.34), 7)])
def test_shares_become_steps(steps, most):
    args = SimpleNamespace(logging_steps=steps[0], eval_steps=steps[1], save_steps=steps[2])
    ours, theirs = TrainerState(), transformers.TrainerState()
    ours.compute_steps(args, most)
    theirs.compute_steps(args, most)
    assert asdict(ours) == asdict(theirs)


def test_what_is_constant_during_the_run():
    trial = SimpleNamespace(number=4, params={"learning_rate": 0.1})
    trainer = SimpleNamespace(
        hp_name=lambda trial: f"run-{trial.number}",
        _trial=trial,
        is_local_process_zero=lambda: True,
        is_world_process_zero=lambda: False,
    )
    state = TrainerState(trial_params={"old": 1})
    state.init_training_references(trainer, 30, 3, trial)
    assert (state.trial_name, state.trial_params, state.max_steps, state.num_train_epochs) == ("run-4", trial.params, 30, 3)
    assert (state.is_local_process_zero, state.is_world_process_zero) == (True, False)
    state.init_training_references(trainer, 30, 3, {"seed": 2})
    assert state.trial_params == {"seed": 2}
    trainer._trial = trainer.hp_name = None
    fresh = TrainerState()
    fresh.init_training_references(trainer, 30, 3, None)
    assert (fresh.trial_name, fresh.trial_params) == (None, None)


def test_callbacks_may_be_given_instead_of_their_states():
    callbacks = [EarlyStoppingCallback(2), TrainerControl(), EarlyStoppingCallback(3)]
    theirs = [transformers.EarlyStoppingCallback(2), transformers.TrainerControl(), transformers.EarlyStoppingCallback(3)]
    ours = TrainerState(stateful_callbacks=callbacks).stateful_callbacks
    assert ours == transformers.TrainerState(stateful_callbacks=theirs).stateful_callbacks
    assert TrainerState(stateful_callbacks=None, log_history=None) == TrainerState()
    with pytest.raises(ArgumentError, match="PrinterCallback has no state to save: derive it from ExportableState"):
        TrainerState(stateful_callbacks=[PrinterCallback()])


def test_each_event_clears_its_flags():
    names = [item.name for item in fields(TrainerControl)]
    for method in ("_new_training", "_new_epoch", "_new_step"):
        ours, theirs = TrainerControl(*[True] * 5), transformers.TrainerControl(*[True] * 5)
        getattr(ours, method)()
        getattr(theirs, method)()
        assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


def test_a_control_goes_through_its_state():
    control = TrainerControl(should_save=True, should_epoch_stop=True)
    assert control.state() == transformers.TrainerControl(should_save=True, should_epoch_stop=True).state()
    assert TrainerControl.from_state(control.state()) == control


def test_a_state_must_be_defined():
    with pytest.raises(NotImplementedError, match=r"ExportableState must define state\(\)"):
        ExportableState().state()
