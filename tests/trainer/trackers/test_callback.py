"""The callback that drives trackers: when they are opened, told and closed, and what happens when they fail."""

import json
import os
import signal

import pytest

from fts.errors import ArgumentError, CallbackError, CheckpointError, Interrupted
from fts.trainer import TrainerCallback, TrainerState
from fts.trainer.trackers import TrackerCallback, callback as room, tracker_callbacks
from fts.trainer.trackers.tracker import TrackerRun
from tests.trainer.helpers import arguments, make_trainer

SHORT = {"max_steps": 6, "logging_steps": 1}


class Memory:
    """A tracker with accelerate's methods that remembers the calls; those in `fails` raise so many times."""

    name = "memory"

    def __init__(self, **fails):
        self.calls = []
        self.fails = fails

    def _called(self, method, *values):
        self.calls.append((method, *values))
        if self.fails.get(method, 0):
            self.fails[method] -= 1
            raise ConnectionError("no route")

    def start(self):
        self._called("start")

    def store_init_configuration(self, values):
        self._called("facts", values)

    def log(self, values, step=None):
        self._called("log", values, step)

    def finish(self):
        self._called("finish")

    def named(self):
        return [call[0] for call in self.calls]


def test_a_tracker_of_ones_own_hears_of_a_run(tmp_path):
    tracker = Memory()
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2, callbacks=[TrackerCallback([tracker])])
    trainer.train()
    assert tracker.named() == ["start", "facts", "log", "log", "log", "finish"]
    history = trainer.state.log_history
    steps = [(call[2], call[1]["train/epoch"]) for call in tracker.calls if call[0] == "log"]
    assert steps == [(entry["step"], entry["epoch"]) for entry in history]
    assert tracker.calls[2][1]["train/loss"] == history[0]["loss"]
    assert tracker.calls[1][1]["plan/total_steps"] == 4


def test_a_failure_is_warned_of_once_and_training_goes_on(tmp_path, caplog):
    tracker = Memory(log=2)
    result = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([tracker])]).train()
    assert result.global_step == 6
    warnings = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("The tracker memory failed: ConnectionError: no route. Training goes on")
    assert tracker.named().count("log") == 7 and tracker.named()[-1] == "finish"  # it came back


def test_a_tracker_that_stays_away_is_given_up(tmp_path, caplog):
    tracker, other = Memory(log=99), Memory()
    other.name = "other"
    make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([tracker, other])]).train()
    assert tracker.named().count("log") == 3
    assert other.named().count("log") == 7
    assert sum("tracker memory" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("method", ["facts", "finish"])
def test_no_failure_stops_training(tmp_path, method):
    tracker = Memory(**{method: 1})
    assert make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([tracker])]).train().global_step == 6


def test_what_cannot_start_is_an_error_before_training(tmp_path):
    first, second = Memory(), Memory(start=1)
    second.name = "second"
    trainer = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([first, second])])
    with pytest.raises(CallbackError, match=r"tracker second cannot start: ConnectionError: no route. .* leave it out"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert first.named()[-1] == "finish"


def test_what_need_not_start_is_left_out(tmp_path, caplog):
    tracker = Memory(start=1)
    trainer = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([tracker], optional=["memory"])])
    assert trainer.train().global_step == 6
    assert tracker.named() == ["start"]
    assert "The run goes on without it" in caplog.text


def test_an_unknown_name_is_an_error():
    with pytest.raises(ArgumentError, match=r"TrackerCallback knows no tracker 'wandbb'. It knows: aim"):
        TrackerCallback(["wandbb"])


def test_only_the_main_process_tracks():
    tracker = Memory()
    state = TrainerState(is_world_process_zero=False)
    shown = TrackerCallback([tracker])
    shown.on_train_begin(arguments("unused"), state, None)
    shown.on_log(arguments("unused"), state, None, logs={"loss": 1.0})
    shown.on_train_end(arguments("unused"), state, None)
    assert tracker.calls == []


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyError("lost")


class Terminates(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("callbacks", "settings", "error"),
    [([Fails], {}, KeyError), ([Terminates], {}, Interrupted), ([], {"max_time": 1e-9}, Interrupted)],
    ids=["error", "signal", "time"],
)
def test_a_run_is_closed_however_training_ends(tmp_path, callbacks, settings, error):
    tracker = Memory()
    trainer = make_trainer(tmp_path, **SHORT, **settings, callbacks=[TrackerCallback([tracker]), *callbacks])
    with pytest.raises(error):
        trainer.train()
    assert tracker.named().count("finish") == 1 and tracker.named()[-1] == "finish"


def test_numbers_alone_are_sent(tmp_path):
    tracker = Memory()
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[TrackerCallback([tracker])])
    trainer.log({"loss": 1.0, "note": "warm", "count": 2})
    assert tracker.calls[2][1] == {"train/loss": 1.0, "train/count": 2, "train/epoch": 0.0}


def test_logs_outside_training_open_a_run_once_more(tmp_path):
    tracker = Memory()
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=5, callbacks=[TrackerCallback([tracker])])
    trainer.train()
    before = len(tracker.calls)
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    kinds = [name for name in tracker.named()[before:] if name != "facts"]
    assert kinds == ["start", "log", "finish"] * 2
    logs = [call[1] for call in tracker.calls[before:] if call[0] == "log"]
    assert "eval/loss" in logs[0] and "test/loss" in logs[1]


class Named:
    """Openers of runs that have names."""

    def __init__(self):
        self.openings = []

    def __call__(self, opening):
        self.openings.append(opening)
        tracker = Memory()
        return TrackerRun(tracker, opening.run_id or f"run-{len(self.openings)}", finish=tracker.finish)


@pytest.fixture
def named(monkeypatch):
    opener = Named()
    monkeypatch.setitem(room.OPENERS, "tensorboard", opener)
    return opener


def test_a_resumed_run_goes_on_with_its_own(tmp_path, named):
    settings = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 2, "run_name": "mine", "project": "group"}
    make_trainer(tmp_path, max_steps=4, **settings).train()
    kept = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]["TrackerCallback"]
    assert kept["attributes"] == {"runs": {"tensorboard": "run-1"}}
    make_trainer(tmp_path, max_steps=4, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [(opening.run_id, opening.step) for opening in named.openings] == [(None, 0), ("run-1", 2)]
    assert all((opening.name, opening.project) == ("mine", "group") for opening in named.openings)


def test_a_second_training_is_a_new_run(tmp_path, named):
    trainer = make_trainer(tmp_path, max_steps=2, report_to="tensorboard")
    trainer.train()
    trainer.evaluate()
    trainer.train()
    assert [opening.run_id for opening in named.openings] == [None, "run-1", None]


def test_report_to_becomes_callbacks():
    assert tracker_callbacks([]) == []
    (several,) = tracker_callbacks(["wandb", "tensorboard"])
    assert several.trackers == ["wandb", "tensorboard"] and several.optional == []
    both = tracker_callbacks(["flyte", "mlflow"])
    assert [type(one).__name__ for one in both] == ["TrackerCallback", "FlyteCallback"]


def test_all_means_what_is_installed(monkeypatch):
    from fts.trainer.arguments import tracker_packages

    monkeypatch.setattr(tracker_packages, "_found", lambda module: module in ("mlflow", "swanlab"))
    monkeypatch.delenv(tracker_packages.KUBEFLOW_VARIABLE, raising=False)
    (several,) = tracker_callbacks(["all"])
    assert several.trackers == several.optional == ["mlflow", "swanlab"]
    (mixed,) = tracker_callbacks(["mlflow", "all"])
    assert mixed.optional == ["swanlab"]  # what is named must start


def test_the_trainer_has_them_behind_the_flow(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = make_trainer(tmp_path, report_to="tensorboard", callbacks=[Fails])
    names = trainer.callback_handler.callback_list.splitlines()
    assert names == ["DefaultFlowCallback", "TrackerCallback", "Fails", "PrinterCallback"]


def test_a_run_that_the_script_began_stays_open(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        with mlflow.start_run(run_name="outer") as run:
            make_trainer(tmp_path, max_steps=2, logging_steps=1, report_to="mlflow").train()
            assert mlflow.active_run().info.run_id == run.info.run_id
            assert [one.step for one in mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")] == [1, 2]
    finally:
        mlflow.set_tracking_uri(None)


def test_arguments_come_from_the_checkpoint_if_asked(tmp_path, named):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, **settings, report_to="tensorboard").train()
    asked = settings | {"restore_callback_states_from_checkpoint": True}
    again = make_trainer(tmp_path, **asked, callbacks=[TrackerCallback(["wandb"], optional=["wandb"])])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    restored = again.callback_handler.callbacks[1]
    assert (restored.trackers, restored.optional, restored.runs) == (["tensorboard"], [], {"tensorboard": "run-1"})


def test_a_tracker_of_ones_own_is_not_replaced_by_the_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, **settings, callbacks=[TrackerCallback([Memory()])]).train()
    tracker = Memory()
    again = make_trainer(tmp_path, **settings, callbacks=[TrackerCallback([tracker])])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "log" in tracker.named()
    asked = settings | {"restore_callback_states_from_checkpoint": True}
    third = make_trainer(tmp_path, **asked, callbacks=[TrackerCallback([Memory()])])
    with pytest.raises(
        CheckpointError, match=r"TrackerCallback cannot be restored.*restore_callback_states_from_checkpoint=False"
    ):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
