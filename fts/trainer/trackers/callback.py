"""The callback that logs a run to its trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fts.distributed.process_group import is_initialized
from fts.errors import ArgumentError, FtsError
from fts.trainer.callbacks import ExportableState, TrainerCallback
from fts.trainer.trackers import accelerate_trackers
from fts.trainer.trackers.azure_ml import azure_ml
from fts.trainer.trackers.codecarbon import codecarbon
from fts.trainer.trackers.kubeflow import kubeflow
from fts.trainer.trackers.logs import numeric_logs
from fts.trainer.trackers.neptune import neptune
from fts.trainer.trackers.run_config import run_config
from fts.trainer.trackers.tracker import RunInfo, TrackerRun

logger = logging.getLogger(__name__)

OPENERS: dict[str, Callable[[RunInfo], TrackerRun]] = {
    "aim": accelerate_trackers.aim,
    "azure_ml": azure_ml,
    "clearml": accelerate_trackers.clearml,
    "codecarbon": codecarbon,
    "comet_ml": accelerate_trackers.comet_ml,
    "dagshub": accelerate_trackers.dagshub,
    "dvclive": accelerate_trackers.dvclive,
    "kubeflow": kubeflow,
    "mlflow": accelerate_trackers.mlflow,
    "neptune": neptune,
    "swanlab": accelerate_trackers.swanlab,
    "tensorboard": accelerate_trackers.tensorboard,
    "trackio": accelerate_trackers.trackio,
    "wandb": accelerate_trackers.wandb,
}
"""Tracker -> the function that opens its run. `flyte` has a callback of its own."""

TRAINING_ONLY = ("codecarbon",)
"""Trackers that measure training and are not opened outside it."""

MAX_FAILURES = 3
"""A tracker is removed after this many failures in a row."""


class TrackerCallback(TrainerCallback, ExportableState):
    """Sends the logs of the main process to trackers, and the run's configuration once, when it starts.

    A run is open during `train`, and also closed after an error or a signal; a resumed run continues it if the tracker supports
    this. Logs of `evaluate` and `predict` outside training reopen it. A tracker that fails later never stops training: the first
    failure is a warning, the next logs are another attempt, and after three failures in a row the tracker is removed.

    Args:
        trackers: names as in `report_to`, or your own trackers with the methods of an `accelerate.tracking.GeneralTracker`.
        optional: names of trackers that may fail to start; for the others that is an error.
    """

    def __init__(self, trackers: Sequence[Any], optional: Sequence[str] = ()) -> None:
        unknown = [item for item in trackers if isinstance(item, str) and item not in OPENERS]
        if unknown:
            raise ArgumentError(f"TrackerCallback knows no tracker {unknown[0]!r}. It knows: {', '.join(OPENERS)}.")
        self.trackers = list(trackers)
        self.optional = list(optional)
        self.runs: dict[str, str] = {}
        self.open_runs: dict[str, TrackerRun] = {}
        self.failures: dict[str, int] = {}
        self.warned: set[str] = set()
        self.config: dict[str, Any] = {}
        self.plan: Any = None
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        """Open the run of each tracker and store its configuration, or continue a checkpoint's run."""
        self.close()
        if state.global_step == 0:
            self.runs.clear()
        self.failures.clear()
        self.training = True
        self.config = run_config(args, self.plan, model)
        self._start(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Log the metrics."""
        self._send(args, state, logs or {}, kwargs.get("model"))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Log the metrics of a prediction, which `on_log` does not get."""
        self._send(args, state, metrics or {}, kwargs.get("model"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the runs."""
        self.close()

    def close(self, failed: bool = False) -> None:
        """Close the open runs: flush and end them.

        Args:
            failed: whether to end them as failed, if a tracker distinguishes this.
        """
        self.training = False
        for name in list(self.open_runs):
            self._try(name, lambda name=name: self.open_runs[name].close(failed))  # type: ignore[misc]
            self.open_runs.pop(name, None)

    def state(self) -> dict[str, Any]:
        """The state for checkpoints: the ids of the runs, and the arguments if all trackers are given by name."""
        by_name = all(isinstance(item, str) for item in self.trackers)
        arguments = {"trackers": self.trackers, "optional": self.optional} if by_name else {}
        return {"args": arguments, "attributes": {"runs": self.runs}}

    def _send(self, args: Any, state: Any, logs: Mapping[str, Any], model: Any) -> None:
        outside = not self.training
        if outside:
            self.config = self.config or run_config(args, None, model)
            self._start(args, state)
        metrics = numeric_logs(logs)
        for name, run in list(self.open_runs.items()):
            self._try(name, lambda run=run: run.log(metrics, state.global_step))  # type: ignore[misc]
        if outside:
            self.close()

    def _start(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        _provide_state(args)
        for item in self.trackers:
            name = item if isinstance(item, str) else getattr(item, "name", type(item).__name__)
            if name in TRAINING_ONLY and not self.training:
                continue
            run_id, run_name = self.runs.get(name), state.trial_name or args.run_name
            run = self._open(name, item, RunInfo(args, state.global_step, run_id, run_name, args.project, self.config))
            if run is None:
                continue
            self.open_runs[name] = run
            if run.run_id is not None:
                self.runs[name] = run.run_id
            if run_id is None and not run.has_config:
                self._try(name, lambda run=run: run.tracker.store_init_configuration(self.config))  # type: ignore[misc]

    def _open(self, name: str, item: Any, info: RunInfo) -> TrackerRun | None:
        try:
            if isinstance(item, str):
                return OPENERS[item](info)
            item.start()
            return TrackerRun(item, finish=item.finish)
        except FtsError:
            raise
        except Exception as error:
            problem = f"The tracker {name} cannot start: {type(error).__name__}: {error}."
            if name not in self.optional:
                self.close(failed=True)
                raise ArgumentError(f"{problem} Fix that, or leave it out of report_to.") from error
            self._warn(name, f"{problem} The run continues without it.")
            return None

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - no tracker may stop training
            count = self.failures[name] = self.failures.get(name, 0) + 1
            self._warn(
                name,
                f"The tracker {name} failed: {type(error).__name__}: {error}. Training continues; the next logs are another "
                f"attempt, and after {MAX_FAILURES} failures in a row it is removed.",
            )
            if count >= MAX_FAILURES:
                self.open_runs.pop(name, None)
        else:
            self.failures[name] = 0

    def _warn(self, name: str, text: str) -> None:
        if name not in self.warned:
            self.warned.add(name)
            logger.warning("%s", text)


def set_plan(callbacks: Iterable[Any], plan: Any) -> None:
    """Give trackers the plan of the run that is about to start; no event has it.

    Args:
        callbacks: any.
        plan: a `fts.trainer.arguments.plan.Plan`.
    """
    for callback in callbacks:
        if isinstance(callback, TrackerCallback):
            callback.plan = plan


def close_trackers(callbacks: Iterable[Any], failed: bool = True) -> None:
    """Close the runs of all trackers after an exception, since no event does.

    Args:
        callbacks: any.
        failed: see `TrackerCallback.close`.
    """
    for callback in callbacks:
        if isinstance(callback, TrackerCallback):
            callback.close(failed)


def _provide_state(args: Any) -> None:
    """Create the state from which accelerate's trackers read the rank, unless it exists."""
    from accelerate.state import PartialState

    if PartialState._shared_state == {} and (is_initialized() or args.world_size == 1):
        PartialState(cpu=args.device.type == "cpu")
