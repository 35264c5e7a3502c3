"""The trackers that accelerate supports: how each opens a run, or continues that of a checkpoint.

A run that the script has started itself (`wandb.init()`, `mlflow.start_run()` …) is used, and left open.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from fts.trainer.trackers.logs import keep_names
from fts.trainer.trackers.tracker import GLOBAL_STEP, RunInfo, TrackerRun


def tensorboard(info: RunInfo) -> TrackerRun:
    """Event files in `TENSORBOARD_LOGGING_DIR`, by default `output_dir/runs/<time>_<host>`, or those of a resumed run."""
    from accelerate.tracking import TensorBoardTracker

    root = Path(str(info.args.output_dir)).absolute()
    directory = os.environ.get("TENSORBOARD_LOGGING_DIR")
    default = Path("runs") / f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}"
    new = default if directory is None else Path(directory).absolute()
    folder = root / (info.run_id or new)
    # what an interrupted run logged after its last checkpoint is logged again
    purge = {"purge_step": info.step + 1} if info.run_id else {}
    tracker = TensorBoardTracker("", logging_dir=folder, **purge)
    tracker.start()
    # relative to output_dir, which may be moved or copied
    run_id = folder.relative_to(root) if folder.is_relative_to(root) else folder
    return TrackerRun(tracker, str(run_id), finish=tracker.finish)


def wandb(info: RunInfo) -> TrackerRun:
    """A W&B run; `WANDB_PROJECT` and W&B's other environment variables apply."""
    import wandb
    from accelerate.tracking import WandBTracker

    project = os.environ.get("WANDB_PROJECT", info.project)
    resume_options = {"id": info.run_id, "resume": "allow"} if info.run_id else {}
    tracker = WandBTracker(project, name=info.name, **resume_options)
    started = wandb.run is None
    if started:
        if info.run_id:
            # its directory is named by the second and the run: opening it twice in one second would overwrite its files
            second = int(time.time())
            while int(time.time()) <= second:  # sleep uses another clock and may end just before
                time.sleep(1.001 - time.time() % 1.0)
        tracker.start()
    else:
        tracker.run = wandb.run
    run = tracker.run
    run.define_metric(GLOBAL_STEP)
    run.define_metric("*", step_metric=GLOBAL_STEP, step_sync=True)
    end: dict[str, Any] = {"finish": tracker.finish, "fail": lambda: run.finish(exit_code=1)} if started else {}
    return TrackerRun(tracker, run.id, counts_steps=True, **end)


def trackio(info: RunInfo) -> TrackerRun:
    """A trackio run on the Space `trackio_space_id`, or in a local directory if that is None."""
    from accelerate.tracking import TrackioTracker

    args = info.args
    space = {"space_id": args.trackio_space_id, "bucket_id": args.trackio_bucket_id, "private": args.hub_private_repo}
    name = info.run_id or info.name
    resume = "allow" if info.run_id else "never"
    # trackio stores the config that `init` gets, also of a run that is opened again
    tracker = TrackioTracker(info.project, name=name, resume=resume, config=dict(info.config), **space)
    tracker.start()

    def finish() -> None:
        tracker.finish()
        _sync_static_space(info)

    return TrackerRun(tracker, tracker.run.name, has_config=True, counts_steps=True, finish=finish)


def _sync_static_space(info: RunInfo) -> None:
    """Show the logs on a static Space, if one is configured."""
    static = info.args.trackio_static_space_id
    if static:
        import trackio

        trackio.sync(info.project, space_id=static, private=info.args.hub_private_repo, sdk="static")


def mlflow(info: RunInfo) -> TrackerRun:
    """An MLflow run in `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME`; its metrics have the names of the logs."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(info.project, run_id=info.run_id, run_name=info.name)
    started = mlflow.active_run() is None or bool(tracker.nested_run)
    if started:
        tracker.start()
    else:
        tracker.active_run = mlflow.active_run()
    end: dict[str, Any] = {"finish": tracker.finish, "fail": lambda: mlflow.end_run("FAILED")} if started else {}
    return TrackerRun(tracker, tracker.active_run.info.run_id, rewrite=keep_names, **end)


def dagshub(info: RunInfo) -> TrackerRun:
    """MLflow's, on DagsHub: `MLFLOW_TRACKING_URI` names the repository, or else the remote of the current git repository."""
    import dagshub

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        dagshub.init(mlflow=True)
    return mlflow(info)


def comet_ml(info: RunInfo) -> TrackerRun:
    """A Comet experiment; `COMET_PROJECT_NAME`, `COMET_MODE` and `COMET_START_ONLINE` apply."""
    import comet_ml
    from accelerate.tracking import CometMLTracker

    project = os.environ.get("COMET_PROJECT_NAME", info.project)
    online = os.environ.get("COMET_START_ONLINE")
    options: dict[str, Any] = {"mode": os.environ.get("COMET_MODE"), "experiment_key": info.run_id}
    options["online"] = None if online is None else online.lower() in ("1", "true", "yes", "on")
    tracker = CometMLTracker(project, **{name: value for name, value in options.items() if value is not None})
    running = comet_ml.get_running_experiment()
    if running is None:
        tracker.start()
        if info.name is not None and info.run_id is None:
            tracker.writer.set_name(info.name)
    else:
        tracker.writer = running
    return TrackerRun(tracker, tracker.writer.get_key(), finish=tracker.finish if running is None else None)


def clearml(info: RunInfo) -> TrackerRun:
    """A ClearML task; `CLEARML_PROJECT` and `CLEARML_TASK` apply."""
    from accelerate.tracking import ClearMLTracker

    names = {
        "project_name": os.environ.get("CLEARML_PROJECT", info.project),
        "task_name": os.environ.get("CLEARML_TASK", info.name or "Trainer"),
    }
    resume_options = {"continue_last_task": info.run_id} if info.run_id else {}
    frameworks = {"auto_connect_frameworks": {"tensorboard": False, "pytorch": False}}
    tracker = ClearMLTracker(None, **names, **frameworks, **resume_options)
    tracker.start()
    task = tracker.task
    started = not tracker._initialized_externally
    fail = (lambda: (task.mark_failed(), task.close())) if started else None
    return TrackerRun(tracker, task.id, rewrite=keep_names, finish=tracker.finish, fail=fail)


def dvclive(info: RunInfo) -> TrackerRun:
    """DVCLive's files, in the working directory."""
    from accelerate.tracking import DVCLiveTracker

    resume_options = {"resume": True} if info.run_id else {}
    name = {"exp_name": info.name} if info.name else {}
    tracker = DVCLiveTracker(None, **resume_options, **name)
    tracker.start()
    return TrackerRun(tracker, str(tracker.live.dir), finish=tracker.finish)


def swanlab(info: RunInfo) -> TrackerRun:
    """A SwanLab run; `SWANLAB_PROJECT` and `SWANLAB_MODE` apply."""
    import swanlab
    from accelerate.tracking import SwanLabTracker

    project = os.environ.get("SWANLAB_PROJECT", info.project)
    options: dict[str, Any] = {"experiment_name": info.name, "mode": os.environ.get("SWANLAB_MODE")}
    if info.run_id:
        options |= {"id": info.run_id, "resume": "allow"}
    tracker = SwanLabTracker(project, **{name: value for name, value in options.items() if value is not None})
    tracker.start()
    return TrackerRun(tracker, getattr(swanlab.get_run(), "id", None), finish=tracker.finish)


def aim(info: RunInfo) -> TrackerRun:
    """An Aim run, in the repository at `AIM_REPO` or the working directory."""
    from accelerate.tracking import AimTracker

    folder = os.environ.get("AIM_REPO", ".")
    resume_options = {"run_hash": info.run_id} if info.run_id else {}
    tracker = AimTracker(info.name, logging_dir=folder, experiment=info.project, **resume_options)
    tracker.start()
    return TrackerRun(tracker, tracker.writer.hash, finish=tracker.finish)
