"""The trackers that accelerate drives: how each is opened, and how a resumed run goes on with its run.

A run that the script began itself (`wandb.init()`, `mlflow.start_run()` …) is used, and left open.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from fts.trainer.trackers.names import as_they_are
from fts.trainer.trackers.tracker import STEP, Opening, Tracking


def tensorboard(opening: Opening) -> Tracking:
    """Event files in `TENSORBOARD_LOGGING_DIR`, by default `output_dir/runs/<time>_<host>`; a resumed run goes on in its own."""
    from accelerate.tracking import TensorBoardTracker

    root = Path(str(opening.args.output_dir)).absolute()
    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    new = Path("runs") / f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}" if given is None else Path(given).absolute()
    folder = root / (opening.run_id or new)
    # what an interrupted run logged after its last checkpoint is logged again
    purge = {"purge_step": opening.step + 1} if opening.run_id else {}
    tracker = TensorBoardTracker("", logging_dir=folder, **purge)
    tracker.start()
    # by its place in output_dir, which may be moved or copied
    run_id = folder.relative_to(root) if folder.is_relative_to(root) else folder
    return Tracking(tracker, str(run_id), finish=tracker.finish)


def wandb(opening: Opening) -> Tracking:
    """A W&B run; `WANDB_PROJECT` and W&B's other variables of the environment count."""
    import wandb
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", opening.project)
    again = {"id": opening.run_id, "resume": "allow"} if opening.run_id else {}
    tracker = WandBTracker(project, name=opening.name, **again)
    begun = wandb.run is None
    if begun:
        if opening.run_id:
            # its directory is named by the second and the run: within one second, the second opening would replace the first
            second = int(time.time())
            while int(time.time()) <= second:  # a sleep by another clock may end just before
                time.sleep(1.001 - time.time() % 1.0)
        tracker.start()
    else:
        tracker.run = wandb.run
    run = tracker.run
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    ends: dict[str, Any] = {"finish": tracker.finish, "fail": lambda: run.finish(exit_code=1)} if begun else {}
    return Tracking(tracker, run.id, counts=True, **ends)


def trackio(opening: Opening) -> Tracking:
    """A trackio run on the Space `trackio_space_id`, or in a local directory if that is None."""
    from accelerate.tracking import TrackioTracker

    args = opening.args
    space = {"space_id": args.trackio_space_id, "bucket_id": args.trackio_bucket_id, "private": args.hub_private_repo}
    name = opening.run_id or opening.name
    resume = "allow" if opening.run_id else "never"
    # trackio stores what `init` is given; a run that is opened once more has what it is given then
    tracker = TrackioTracker(opening.project, name=name, resume=resume, config=dict(opening.facts), **space)
    tracker.start()

    def finish() -> None:
        tracker.finish()
        _freeze(opening)

    return Tracking(tracker, tracker.run.name, told=True, counts=True, finish=finish)


def _freeze(opening: Opening) -> None:
    """Show the logs on a static Space, where one is asked for."""
    static = opening.args.trackio_static_space_id
    if static:
        import trackio

        trackio.sync(opening.project, space_id=static, private=opening.args.hub_private_repo, sdk="static")


def mlflow(opening: Opening) -> Tracking:
    """An MLflow run in `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME`; its figures have the names of the logs."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(opening.project, run_id=opening.run_id, run_name=opening.name)
    begun = mlflow.active_run() is None or bool(tracker.nested_run)
    if begun:
        tracker.start()
    else:
        tracker.active_run = mlflow.active_run()
    ends: dict[str, Any] = {"finish": tracker.finish, "fail": lambda: mlflow.end_run("FAILED")} if begun else {}
    return Tracking(tracker, tracker.active_run.info.run_id, rename=as_they_are, **ends)


def dagshub(opening: Opening) -> Tracking:
    """MLflow's, on DagsHub: `MLFLOW_TRACKING_URI` names the repository, or else the remote of the git repository at hand."""
    import dagshub

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        dagshub.init(mlflow=True)
    return mlflow(opening)


def comet_ml(opening: Opening) -> Tracking:
    """A Comet experiment; `COMET_PROJECT_NAME`, `COMET_MODE` and `COMET_START_ONLINE` count."""
    import comet_ml
    from accelerate.tracking import CometMLTracker

    project = os.environ.get("COMET_PROJECT_NAME", opening.project)
    online = os.environ.get("COMET_START_ONLINE")
    given: dict[str, Any] = {"mode": os.environ.get("COMET_MODE"), "experiment_key": opening.run_id}
    given["online"] = None if online is None else online.lower() in ("1", "true", "yes", "on")
    tracker = CometMLTracker(project, **{name: value for name, value in given.items() if value is not None})
    running = comet_ml.get_running_experiment()
    if running is None:
        tracker.start()
        if opening.name is not None and opening.run_id is None:
            tracker.writer.set_name(opening.name)
    else:
        tracker.writer = running
    return Tracking(tracker, tracker.writer.get_key(), finish=tracker.finish if running is None else None)


def clearml(opening: Opening) -> Tracking:
    """A ClearML task; `CLEARML_PROJECT` and `CLEARML_TASK` count."""
    from accelerate.tracking import ClearMLTracker

    names = {
        "project_name": os.environ.get("CLEARML_PROJECT", opening.project),
        "task_name": os.environ.get("CLEARML_TASK", opening.name or "Trainer"),
    }
    again = {"continue_last_task": opening.run_id} if opening.run_id else {}
    frameworks = {"auto_connect_frameworks": {"tensorboard": False, "pytorch": False}}
    tracker = ClearMLTracker(None, **names, **frameworks, **again)
    tracker.start()
    task = tracker.task
    own = not tracker._initialized_externally
    fail = (lambda: (task.mark_failed(), task.close())) if own else None
    return Tracking(tracker, task.id, rename=as_they_are, finish=tracker.finish, fail=fail)


def dvclive(opening: Opening) -> Tracking:
    """DVCLive's files, in the working directory."""
    from accelerate.tracking import DVCLiveTracker

    again = {"resume": True} if opening.run_id else {}
    name = {"exp_name": opening.name} if opening.name else {}
    tracker = DVCLiveTracker(None, **again, **name)
    tracker.start()
    return Tracking(tracker, str(tracker.live.dir), finish=tracker.finish)


def swanlab(opening: Opening) -> Tracking:
    """A SwanLab run; `SWANLAB_PROJECT` and `SWANLAB_MODE` count."""
    import swanlab
    from accelerate.tracking import SwanLabTracker

    project = os.environ.get("SWANLAB_PROJECT", opening.project)
    given: dict[str, Any] = {"experiment_name": opening.name, "mode": os.environ.get("SWANLAB_MODE")}
    if opening.run_id:
        given |= {"id": opening.run_id, "resume": "allow"}
    tracker = SwanLabTracker(project, **{name: value for name, value in given.items() if value is not None})
    tracker.start()
    return Tracking(tracker, getattr(swanlab.get_run(), "id", None), finish=tracker.finish)


def aim(opening: Opening) -> Tracking:
    """An Aim run, in the repository at `AIM_REPO` or the working directory."""
    from accelerate.tracking import AimTracker

    folder = os.environ.get("AIM_REPO", ".")
    again = {"run_hash": opening.run_id} if opening.run_id else {}
    tracker = AimTracker(opening.name, logging_dir=folder, experiment=opening.project, **again)
    tracker.start()
    return Tracking(tracker, tracker.writer.hash, finish=tracker.finish)
