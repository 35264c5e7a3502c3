"""How trackers are opened and closed, by fakes of their documented calls: names, projects, resumed runs.

`test_real.py` runs those that are installed.
"""

import shutil
import sys
import time
import types

import pytest

from fts.trainer import TrainerState
from fts.trainer.trackers import TrackerCallback
from tests.trainer.helpers import make_trainer
from tests.trainer.trackers.fake_modules import fake_module

SHORT = {"max_steps": 4, "logging_steps": 2, "run_name": "mine", "project": "group"}
SAVED = SHORT | {"save_strategy": "steps", "save_steps": 2}


class Recorder:
    """An object whose methods record their arguments and return the given values."""

    def __init__(self, **returns):
        self.calls = []
        self.returns = returns

    def __getattr__(self, name):
        def method(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            value = self.returns.get(name)
            return value(*args, **kwargs) if callable(value) else value

        return method

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def test_trackio_gets_its_spaces(tmp_path, monkeypatch):
    run = types.SimpleNamespace(name="mine", log=lambda values, step=None: None, finish=lambda: None)
    package = Recorder(init=run)
    fake_module(monkeypatch, "trackio", init=package.init, sync=package.sync, config={})
    settings = {"trackio_space_id": "me/live", "trackio_bucket_id": "me/logs", "trackio_static_space_id": "me/after"}
    trainer = make_trainer(tmp_path, **SHORT, **settings, hub_private_repo=True, callbacks=[TrackerCallback(["trackio"])])
    trainer.train()
    ((_, given),) = package.of("init")
    assert given.pop("config")["plan/total_steps"] == 4
    assert given == {
        "project": "group",
        "name": "mine",
        "resume": "never",
        "space_id": "me/live",
        "bucket_id": "me/logs",
        "private": True,
    }
    assert package.of("sync") == [(("group",), {"space_id": "me/after", "private": True, "sdk": "static"})]


@pytest.mark.parametrize("static", [None, False])
def test_trackio_has_no_static_space_unless_asked(tmp_path, monkeypatch, static):
    run = types.SimpleNamespace(name="mine", log=lambda values, step=None: None, finish=lambda: None)
    package = Recorder(init=run)
    fake_module(monkeypatch, "trackio", init=package.init, sync=package.sync, config={})
    settings = {"trackio_space_id": None, "trackio_static_space_id": static}
    make_trainer(tmp_path, **SHORT, **settings, callbacks=[TrackerCallback(["trackio"])]).train()
    assert package.of("init")[0][1]["space_id"] is None
    assert package.of("sync") == []


def test_comet_continues_its_experiment(tmp_path, monkeypatch):
    experiment = Recorder(get_key="key-1")
    package = Recorder(start=experiment, get_running_experiment=None)
    calls = {"start": package.start, "get_running_experiment": package.get_running_experiment}
    fake_module(monkeypatch, "comet_ml", __version__="3.50.0", **calls)
    monkeypatch.setenv("COMET_START_ONLINE", "false")
    make_trainer(tmp_path, **SAVED, callbacks=[TrackerCallback(["comet_ml"])]).train()
    again = make_trainer(tmp_path, **SAVED, callbacks=[TrackerCallback(["comet_ml"])])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    given = {"project_name": "group", "online": False}
    assert [kwargs for _, kwargs in package.of("start")] == [given, given | {"experiment_key": "key-1"}]
    assert experiment.of("set_name") == [(("mine",), {})]
    losses = [(args[0], kwargs["step"]) for args, kwargs in experiment.of("log_metric") if args[0] == "train/loss"]
    assert losses == [("train/loss", 2), ("train/loss", 4), ("train/loss", 4)]
    assert len(experiment.of("log_parameters")) == 1 and len(experiment.of("end")) == 2


def test_clearml_continues_its_task_and_marks_a_failed_one(tmp_path, monkeypatch):
    reports = Recorder()
    task = Recorder(get_logger=reports)
    task.id = "task-1"
    package = Recorder(init=task, current_task=None)
    fake_module(monkeypatch, "clearml", Task=package)

    class Breaks:
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyError("lost")

    with pytest.raises(KeyError):
        make_trainer(tmp_path, **SAVED, callbacks=[TrackerCallback(["clearml"]), Breaks()]).train()
    assert [name for name, *_ in task.calls if name in ("mark_failed", "close")] == ["mark_failed", "close"]
    again = make_trainer(tmp_path, **SAVED, callbacks=[TrackerCallback(["clearml"])])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    first, second = (kwargs for _, kwargs in package.of("init"))
    assert (first["project_name"], first["task_name"]) == ("group", "mine")
    assert "continue_last_task" not in first and second["continue_last_task"] == "task-1"
    scalars = [(kwargs["series"], kwargs["title"], kwargs["iteration"]) for _, kwargs in reports.of("report_scalar")]
    assert ("train", "loss", 2) in scalars and ("train", "loss", 4) in scalars
    assert len(task.of("mark_failed")) == 1


def test_swanlab_continues_its_run(tmp_path, monkeypatch):
    run = Recorder()
    run.id = "run-1"
    package = Recorder(init=run, get_run=run)
    fake_module(monkeypatch, "swanlab", init=package.init, get_run=package.get_run, config={})
    monkeypatch.setenv("SWANLAB_MODE", "local")
    make_trainer(tmp_path, **SAVED, callbacks=[TrackerCallback(["swanlab"])]).train()
    again = make_trainer(tmp_path, **SAVED, callbacks=[TrackerCallback(["swanlab"])])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    given = {"project": "group", "experiment_name": "mine", "mode": "local"}
    assert [kwargs for _, kwargs in package.of("init")] == [given, given | {"id": "run-1", "resume": "allow"}]
    assert [kwargs["step"] for args, kwargs in run.of("log") if "train/loss" in args[0]] == [2, 4, 4]
    assert len(run.of("finish")) == 2


def test_aim_continues_its_run(tmp_path, monkeypatch):
    made = []

    class Run(dict):
        def __init__(self, **given):
            made.append(self)
            self.given, self.hash, self.tracked, self.closed = given, given.get("run_hash", "hash-1"), [], False

        def track(self, value, name, step):
            self.tracked.append((name, step))

        def close(self):
            self.closed = True

    fake_module(monkeypatch, "aim", Run=Run)
    monkeypatch.setenv("AIM_REPO", str(tmp_path))
    make_trainer(tmp_path, **SAVED, callbacks=[TrackerCallback(["aim"])]).train()
    again = make_trainer(tmp_path, **SAVED, callbacks=[TrackerCallback(["aim"])])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    given = {"repo": str(tmp_path), "experiment": "group"}
    assert [run.given for run in made] == [given, given | {"run_hash": "hash-1"}]
    assert made[0].name == "mine" and made[0]["hparams"]["plan/total_steps"] == 4
    assert ("train/loss", 2) in made[0].tracked and ("train/loss", 4) in made[1].tracked
    assert all(run.closed for run in made)


@pytest.mark.parametrize("name", ["comet_ml", "clearml"])
def test_a_run_started_by_the_script_stays_open(tmp_path, monkeypatch, name):
    running = Recorder(get_key="key", get_logger=Recorder())
    running.id = "task"
    if name == "comet_ml":
        fake_module(monkeypatch, name, __version__="3.50.0", get_running_experiment=lambda: running)
    else:
        fake_module(monkeypatch, name, Task=Recorder(current_task=running))
    make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback([name])]).train()
    assert not {"end", "close", "mark_failed"} & {called for called, *_ in running.calls}
    assert running.of("log_parameters") or running.of("connect_configuration")


def test_a_wandb_run_of_the_script_is_used_and_left_open(tmp_path, monkeypatch):
    run = Recorder()
    run.id = "outer"
    fake_module(monkeypatch, "wandb", run=run, config=Recorder())
    make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback(["wandb"])]).train()
    assert [args[0]["train/global_step"] for args, _ in run.of("log")] == [2, 4, 4]
    assert run.of("finish") == []
    assert len(sys.modules["wandb"].config.of("update")) == 1


def test_tensorboard_writes_to_the_directory_of_the_environment(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    make_trainer(tmp_path / "out", **SHORT, report_to="tensorboard").train()
    assert list((tmp_path / "events").glob("events.out.tfevents.*"))
    assert not (tmp_path / "out").exists()


def test_a_directory_that_was_copied_has_its_own_events(tmp_path):
    pytest.importorskip("tensorboard")
    make_trainer(tmp_path / "old", **SAVED, report_to="tensorboard").train()
    before = sorted((tmp_path / "old" / "runs").rglob("*"))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    again = make_trainer(tmp_path / "new", **SAVED, report_to="tensorboard")
    again.train(resume_from_checkpoint=str(tmp_path / "new" / "checkpoint-2"))
    assert sorted((tmp_path / "old" / "runs").rglob("*")) == before
    (folder,) = (tmp_path / "new" / "runs").iterdir()
    assert len(list(folder.glob("events.*"))) > len(
        [path for path in before if path.name.startswith("events") and path.parent.parent.name == "runs"]
    )


def test_a_trial_of_a_search_has_its_own_name(tmp_path, monkeypatch):
    run = Recorder()
    run.id = "run"
    package = Recorder(init=run)
    fake_module(monkeypatch, "wandb", run=None, init=package.init, config=Recorder())
    trainer = make_trainer(tmp_path, **SHORT, callbacks=[TrackerCallback(["wandb"])])
    state = TrainerState(trial_name="trial 3")
    trainer.callback_handler.callbacks[1].on_train_begin(trainer.args, state, None, model=trainer.model)
    assert package.of("init")[0][1] == {"project": "group", "name": "trial 3"}


def test_wandb_is_not_opened_twice_in_a_second(tmp_path, monkeypatch):
    run = Recorder()
    run.id = "run"
    seconds = []
    fake_module(
        monkeypatch, "wandb", run=None, init=lambda **given: (seconds.append(int(time.time())), run)[1], config=Recorder()
    )
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[TrackerCallback(["wandb"])])
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert len(seconds) == len(set(seconds)) == 3


def test_dagshub_is_mlflow_on_the_current_repository(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/hub.db"
    fake_module(monkeypatch, "dagshub", init=lambda mlflow: sys.modules["mlflow"].set_tracking_uri(uri))
    try:
        settings = {"max_steps": 4, "logging_steps": 2, "run_name": "mine"}
        make_trainer(tmp_path, **settings, callbacks=[TrackerCallback(["dagshub"])]).train()
        client = mlflow.MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("huggingface").experiment_id])
        assert run.info.run_name == "mine" and "loss" in run.data.metrics
    finally:
        mlflow.set_tracking_uri(None)
