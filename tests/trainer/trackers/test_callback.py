"""The callback of the trackers: when runs are opened, logged to and closed, and what happens when a tracker fails."""

import json
import os
import signal

import pytest

from fts.errors import ArgumentError, CallbackError, CheckpointError, Interrupted
from fts.trainer import TrainerCallback, TrainerState
from fts.trainer.trackers import TrackerCallback, callback as callback_module, tracker_callbacks
from fts.trainer.trackers.tracker import TrackerRun
from tests.trainer.helpers import arguments, make_trainer

SHORT = {"max_steps": 6, "logging_steps": 1}


class RecordingTracker:
    """A tracker with accelerate's methods that records the calls; those in `fails` raise so many times."""

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
        self._called("config", values)

    def log(self, values, step=None):
        self._called("log", values, step)

    def finish(self):
        self._called("finish")

    def named(self):
        return [call[0] for call in self.calls]


def test_a_custom_tracker_gets_config_logs_and_finish(tmp_path):
    tracker = RecordingTracker()
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2, callbacks=[TrackerCallback([tracker])])
    trainer.train()
    assert tracker.named() == ["start", "config", "log", "log", "log", "finish"]
    history = trainer.state.log_history
    steps = [(call[2], call[1]["train/epoch"]) for call in tracker.calls if call[0] == "log"]
    assert steps == [(entry["step"], entry["epoch"]) for entry in history]
    assert tracker.calls[2][1]["train/loss"] == history[0]["loss"]
    assert tracker.calls[1][1]["plan/total_steps"] == 4


def test_a_failure_warns_once_and_training_continues(tmp_path, caplog):
    tracker = RecordingTracker(log=2)
    result = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([tracker])]).train()
    assert result.global_step == 6
    warnings = [record.getMessage() for record in caplog.records if "tracker" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("The tracker memory failed: ConnectionError: no route. Training continues")
    assert tracker.named().count("log") == 7 and tracker.named()[-1] == "finish"  # it recovered


def test_a_tracker_that_keeps_failing_is_removed(tmp_path, caplog):
    tracker, other = RecordingTracker(log=99), RecordingTracker()
    other.name = "other"
    make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([tracker, other])]).train()
    assert tracker.named().count("log") == 3
    assert other.named().count("log") == 7
    assert sum("tracker memory" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("method", ["config", "finish"])
def test_no_failure_stops_training(tmp_path, method):
    tracker = RecordingTracker(**{method: 1})
    assert make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([tracker])]).train().global_step == 6


def test_a_tracker_that_cannot_start_is_an_error_before_training(tmp_path):
    first, second = RecordingTracker(), RecordingTracker(start=1)
    second.name = "second"
    trainer = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([first, second])])
    with pytest.raises(CallbackError, match=r"tracker second cannot start: ConnectionError: no route. .* leave it out"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert first.named()[-1] == "finish"


def test_an_optional_tracker_that_cannot_start_is_left_out(tmp_path, caplog):
    tracker = RecordingTracker(start=1)
    trainer = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([tracker], optional=["memory"])])
    assert trainer.train().global_step == 6
    assert tracker.named() == ["start"]
    assert "The run continues without it" in caplog.text


def test_an_unknown_name_is_an_error():
    with pytest.raises(ArgumentError, match=r"TrackerCallback knows no tracker 'wandbb'. It knows: aim"):
        TrackerCallback(["wandbb"])


def test_only_the_main_process_tracks():
    tracker = RecordingTracker()
    state = TrainerState(is_world_process_zero=False)
    callback = TrackerCallback([tracker])
    callback.on_train_begin(arguments("unused"), state, None)
    callback.on_log(arguments("unused"), state, None, logs={"loss": 1.0})
    callback.on_train_end(arguments("unused"), state, None)
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
    tracker = RecordingTracker()
    trainer = make_trainer(tmp_path, **SHORT, **settings, callbacks=[TrackerCallback([tracker]), *callbacks])
    with pytest.raises(error):
        trainer.train()
    assert tracker.named().count("finish") == 1 and tracker.named()[-1] == "finish"


def test_only_numbers_are_logged(tmp_path):
    tracker = RecordingTracker()
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[TrackerCallback([tracker])])
    trainer.log({"loss": 1.0, "note": "warm", "count": 2})
    assert tracker.calls[2][1] == {"train/loss": 1.0, "train/count": 2, "train/epoch": 0.0}


def test_logs_outside_training_reopen_the_run(tmp_path):
    tracker = RecordingTracker()
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=5, callbacks=[TrackerCallback([tracker])])
    trainer.train()
    before = len(tracker.calls)
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    kinds = [name for name in tracker.named()[before:] if name != "config"]
    assert kinds == ["start", "log", "finish"] * 2
    logs = [call[1] for call in tracker.calls[before:] if call[0] == "log"]
    assert "eval/loss" in logs[0] and "test/loss" in logs[1]


class Opener:
    """Opens runs with ids, and records what it gets."""

    def __init__(self):
        self.infos = []

    def __call__(self, info):
        self.infos.append(info)
        tracker = RecordingTracker()
        return TrackerRun(tracker, info.run_id or f"run-{len(self.infos)}", finish=tracker.finish)


@pytest.fixture
def opener(monkeypatch):
    opener = Opener()
    monkeypatch.setitem(callback_module.OPENERS, "tensorboard", opener)
    return opener


def test_a_resumed_run_continues_its_tracker_run(tmp_path, opener):
    settings = {"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 2, "run_name": "mine", "project": "group"}
    make_trainer(tmp_path, max_steps=4, **settings).train()
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]["TrackerCallback"]
    assert saved["attributes"] == {"runs": {"tensorboard": "run-1"}}
    make_trainer(tmp_path, max_steps=4, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [(info.run_id, info.step) for info in opener.infos] == [(None, 0), ("run-1", 2)]
    assert all((info.name, info.project) == ("mine", "group") for info in opener.infos)


def test_a_second_training_is_a_new_run(tmp_path, opener):
    trainer = make_trainer(tmp_path, max_steps=2, report_to="tensorboard")
    trainer.train()
    trainer.evaluate()
    trainer.train()
    assert [info.run_id for info in opener.infos] == [None, "run-1", None]


def test_report_to_makes_callbacks():
    assert tracker_callbacks([]) == []
    (callback,) = tracker_callbacks(["wandb", "tensorboard"])
    assert callback.trackers == ["wandb", "tensorboard"] and callback.optional == []
    both = tracker_callbacks(["flyte", "mlflow"])
    assert [type(one).__name__ for one in both] == ["TrackerCallback", "FlyteCallback"]


def test_all_means_every_installed_tracker(monkeypatch):
    from fts.trainer.arguments import tracker_packages

    monkeypatch.setattr(tracker_packages, "_is_found", lambda module: module in ("mlflow", "swanlab"))
    monkeypatch.delenv(tracker_packages.KUBEFLOW_VARIABLE, raising=False)
    (callback,) = tracker_callbacks(["all"])
    assert callback.trackers == callback.optional == ["mlflow", "swanlab"]
    (mixed,) = tracker_callbacks(["mlflow", "all"])
    assert mixed.optional == ["swanlab"]  # a named tracker must start


def test_trackers_come_after_the_flow_callback(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = make_trainer(tmp_path, report_to="tensorboard", callbacks=[Fails])
    names = trainer.callback_handler.callback_list.splitlines()
    assert names == ["DefaultFlowCallback", "TrackerCallback", "Fails", "PrinterCallback"]


def test_a_run_started_by_the_script_stays_open(tmp_path, monkeypatch):
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


def test_arguments_are_restored_from_the_checkpoint_if_requested(tmp_path, opener):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, **settings, report_to="tensorboard").train()
    restoring = settings | {"restore_callback_states_from_checkpoint": True}
    again = make_trainer(tmp_path, **restoring, callbacks=[TrackerCallback(["wandb"], optional=["wandb"])])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    restored = again.callback_handler.callbacks[1]
    assert (restored.trackers, restored.optional, restored.runs) == (["tensorboard"], [], {"tensorboard": "run-1"})


def test_a_custom_tracker_is_not_replaced_by_the_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tmp_path, **settings, callbacks=[TrackerCallback([RecordingTracker()])]).train()
    tracker = RecordingTracker()
    again = make_trainer(tmp_path, **settings, callbacks=[TrackerCallback([tracker])])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "log" in tracker.named()
    restoring = settings | {"restore_callback_states_from_checkpoint": True}
    third = make_trainer(tmp_path, **restoring, callbacks=[TrackerCallback([RecordingTracker()])])
    with pytest.raises(
        CheckpointError, match=r"TrackerCallback cannot be restored.*restore_callback_states_from_checkpoint=False"
    ):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
