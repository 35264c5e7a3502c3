"""One callback that drives all trackers of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fts.distributed.process_group import is_started
from fts.errors import ArgumentError, FtsError
from fts.trainer.arguments import processes
from fts.trainer.callbacks.base import TrainerCallback
from fts.trainer.callbacks.state import ExportableState
from fts.trainer.trackers import accelerate_trackers, kubeflow, other_trackers
from fts.trainer.trackers.names import numbers
from fts.trainer.trackers.run_config import facts_of
from fts.trainer.trackers.tracker import Opening, Tracking

logger = logging.getLogger(__name__)

OPENERS: dict[str, Callable[[Opening], Tracking]] = {
    "aim": accelerate_trackers.aim,
    "azure_ml": other_trackers.azure_ml,
    "clearml": accelerate_trackers.clearml,
    "codecarbon": other_trackers.codecarbon,
    "comet_ml": accelerate_trackers.comet_ml,
    "dagshub": accelerate_trackers.dagshub,
    "dvclive": accelerate_trackers.dvclive,
    "kubeflow": kubeflow.kubeflow,
    "mlflow": accelerate_trackers.mlflow,
    "neptune": other_trackers.neptune,
    "swanlab": accelerate_trackers.swanlab,
    "tensorboard": accelerate_trackers.tensorboard,
    "trackio": accelerate_trackers.trackio,
    "wandb": accelerate_trackers.wandb,
}
"""How each tracker is opened. `flyte` has a callback of its own."""

MEASURES = ("codecarbon",)
"""Trackers that measure training, and have no use for logs outside it."""

LIMIT = 3
"""A tracker that fails so often in a row is given up."""


class TrackerCallback(TrainerCallback, ExportableState):
    """Sends the logs of the main process to trackers, and what there is to know of the run, once, when it begins.

    A run is open while `train` runs, and closed also after an error or a signal; a resumed run goes on with it where the tracker
    can. Logs of `evaluate` and `predict` outside training open it once more. A tracker that fails later on is warned of once,
    tried again with the next logs, and given up when it failed three times in a row: it never stops training.

    Args:
        trackers: names as in `report_to`, or trackers of your own with the methods of an `accelerate.tracking.GeneralTracker`.
        optional: those that may be unable to start; that of another one is an error.
    """

    def __init__(self, trackers: Sequence[Any], optional: Sequence[str] = ()) -> None:
        unknown = [item for item in trackers if isinstance(item, str) and item not in OPENERS]
        if unknown:
            raise ArgumentError(f"TrackerCallback knows no tracker {unknown[0]!r}. It knows: {', '.join(OPENERS)}.")
        self.trackers = list(trackers)
        self.optional = list(optional)
        self.runs: dict[str, str] = {}
        self.open: dict[str, Tracking] = {}
        self.failures: dict[str, int] = {}
        self.warned: set[str] = set()
        self.facts: dict[str, Any] = {}
        self.plan: Any = None
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        """Open the run of each tracker, and tell it the facts; with a checkpoint's run, go on."""
        self.close()
        if state.global_step == 0:
            self.runs.clear()
        self.failures.clear()
        self.training = True
        self.facts = facts_of(args, self.plan, model)
        self._start(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Send the figures."""
        self._send(args, state, logs or {}, kwargs.get("model"))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Send the figures of a prediction, which are not logged."""
        self._send(args, state, metrics or {}, kwargs.get("model"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the runs."""
        self.close()

    def close(self, failed: bool = False) -> None:
        """Close the runs that are open: flushed, and ended.

        Args:
            failed: whether to end them as failed, where a tracker knows the difference.
        """
        self.training = False
        for name in list(self.open):
            self._try(name, lambda name=name: self.open[name].close(failed))  # type: ignore[misc]
            self.open.pop(name, None)

    def state(self) -> dict[str, Any]:
        """What checkpoints keep: the names of the runs, and the arguments, unless there are trackers of the user's own."""
        named = all(isinstance(item, str) for item in self.trackers)
        arguments = {"trackers": self.trackers, "optional": self.optional} if named else {}
        return {"args": arguments, "attributes": {"runs": self.runs}}

    def _send(self, args: Any, state: Any, logs: Mapping[str, Any], model: Any) -> None:
        outside = not self.training
        if outside:
            self.facts = self.facts or facts_of(args, None, model)
            self._start(args, state)
        figures = numbers(logs)
        for name, tracking in list(self.open.items()):
            self._try(name, lambda tracking=tracking: tracking.log(figures, state.global_step))  # type: ignore[misc]
        if outside:
            self.close()

    def _start(self, args: Any, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        _provide_state(args)
        for item in self.trackers:
            name = item if isinstance(item, str) else getattr(item, "name", type(item).__name__)
            if name in MEASURES and not self.training:
                continue
            before = self.runs.get(name)
            called = state.trial_name or args.run_name
            opened = self._opened(name, item, Opening(args, state.global_step, before, called, args.project, self.facts))
            if opened is None:
                continue
            self.open[name] = opened
            if opened.run_id is not None:
                self.runs[name] = opened.run_id
            if before is None and not opened.told:
                self._try(name, lambda opened=opened: opened.tracker.store_init_configuration(self.facts))  # type: ignore[misc]

    def _opened(self, name: str, item: Any, opening: Opening) -> Tracking | None:
        try:
            if isinstance(item, str):
                return OPENERS[item](opening)
            item.start()
            return Tracking(item, finish=item.finish)
        except FtsError:
            raise
        except Exception as error:
            said = f"The tracker {name} cannot start: {type(error).__name__}: {error}."
            if name not in self.optional:
                self.close(failed=True)
                raise ArgumentError(f"{said} Mend that, or leave it out of report_to.") from error
            self._warn(name, f"{said} The run goes on without it.")
            return None

    def _try(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - training is worth more than its log
            count = self.failures[name] = self.failures.get(name, 0) + 1
            self._warn(
                name,
                f"The tracker {name} failed: {type(error).__name__}: {error}. Training goes on; it is tried again with the next "
                f"logs, and given up after {LIMIT} failures in a row.",
            )
            if count >= LIMIT:
                self.open.pop(name, None)
        else:
            self.failures[name] = 0

    def _warn(self, name: str, text: str) -> None:
        if name not in self.warned:
            self.warned.add(name)
            logger.warning("%s", text)


def tell_plan(callbacks: Iterable[Any], plan: Any) -> None:
    """Tell trackers the plan of the run that is about to begin; no event has it.

    Args:
        callbacks: any.
        plan: a `fts.trainer.run.plan.Plan`.
    """
    for callback in callbacks:
        if isinstance(callback, TrackerCallback):
            callback.plan = plan


def close_trackers(callbacks: Iterable[Any], failed: bool = True) -> None:
    """Close the runs of all trackers: after an exception no event does.

    Args:
        callbacks: any.
        failed: see `TrackerCallback.close`.
    """
    for callback in callbacks:
        if isinstance(callback, TrackerCallback):
            callback.close(failed)


def _provide_state(args: Any) -> None:
    """Make the state that accelerate's trackers ask which process this is, unless it is there."""
    from accelerate.state import PartialState

    if PartialState._shared_state == {} and (is_started() or processes.world_size() == 1):
        PartialState(cpu=args.device.type == "cpu")
