"""Callbacks: the events of a run as method calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.choices import IntervalStrategy, SaveStrategy
from fts.trainer.state import ExportableState, TrainerControl, TrainerState

logger = logging.getLogger(__name__)

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
    "on_push_begin",
)
"""The methods that a callback may have."""


class TrainerCallback:
    """A base for callbacks: override the events that you need.

    Each event is called as `on_...(args, state, control, **kwargs)`, where kwargs has `model`, `processing_class`, `optimizer`,
    `lr_scheduler`, `train_dataloader`, `eval_dataloader`, and `logs` or `metrics` where there are some. Set flags of `control` to
    ask for something. In one update, forward, backward and the optimizer are a single step: `on_substep_end`,
    `on_pre_optimizer_step` and `on_optimizer_step` are called in that order right after it, before `on_step_end`. What is not
    overridden costs nothing. Callbacks written for transformers work as they are.

    >>> class Stop(TrainerCallback):
    ...     def on_step_end(self, args, state, control, **kwargs):
    ...         control.should_training_stop = state.global_step == 2
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The Trainer was made."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training begins."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training is over."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A pass over the data begins."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A pass over the data is over."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An update begins."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A micro-batch that is not the last of its update is done."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The gradients are there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The parameters are updated."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An update is done."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An evaluation is done; kwargs has its `metrics`."""

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A prediction is done; kwargs has its `metrics`."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A checkpoint is written."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Figures were logged; kwargs has them as `logs`."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A batch of evaluation or prediction is done."""

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An upload begins."""


class CallbackHandler:
    """Calls the callbacks that have something to do for an event, in order.

    Args:
        callbacks: instances or classes.
        context: what each event gets as keyword arguments, such as the model.
    """

    def __init__(self, callbacks: Iterable[Any], **context: Any) -> None:
        self.callbacks: list[Any] = []
        self.context = context
        self.listeners: dict[str, tuple[Callable[..., Any], ...]] = dict.fromkeys(EVENTS, ())
        for callback in callbacks:
            self.add_callback(callback)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, given as an instance or a class, behind the others."""
        instance = callback() if isinstance(callback, type) else callback
        if not any(hasattr(instance, event) for event in EVENTS):
            raise ArgumentError(f"{type(instance).__name__} is no callback: it has none of the methods {', '.join(EVENTS)}.")
        if type(instance) in [type(other) for other in self.callbacks]:
            logger.warning("The Trainer already has a callback of class %s; now it has two.", type(instance))
        self.callbacks.append(instance)
        self._find_listeners()

    def pop_callback(self, callback: Any) -> Any:
        """Remove the first callback that is, or is an instance of, the given one, and return it; None if there is none."""
        for index, other in enumerate(self.callbacks):
            if isinstance(other, callback) if isinstance(callback, type) else other == callback:
                found = self.callbacks.pop(index)
                self._find_listeners()
                return found
        return None

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, given as an instance or a class."""
        self.pop_callback(callback)

    def call(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Tell everybody who listens to an event.

        Returns:
            The control object, or the one that a callback returned in its place.
        """
        for listener in self.listeners[event]:
            result = listener(args, state, control, **self.context, **kwargs)
            if result is not None:
                control = result
        return control

    def _find_listeners(self) -> None:
        for event in EVENTS:
            found = (getattr(callback, event, None) for callback in self.callbacks)
            self.listeners[event] = tuple(method for method in found if method is not None and not _is_inherited(method, event))


def _is_inherited(method: Any, event: str) -> bool:
    # by name, so that it also knows transformers' base class without importing it
    return getattr(method, "__qualname__", "") == f"TrainerCallback.{event}"


class DefaultFlowCallback(TrainerCallback):
    """Asks for logs, evaluations, checkpoints and the end as the arguments say."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for what is due by steps, and for the end."""
        step = state.global_step
        last = step >= state.max_steps
        if args.logging_strategy is IntervalStrategy.STEPS and step % state.logging_steps == 0:
            control.should_log = True
        if step == 1 and args.logging_first_step:
            control.should_log = True
        if args.eval_strategy is IntervalStrategy.STEPS and (last or step % state.eval_steps == 0):
            control.should_evaluate = True
        if args.save_strategy is SaveStrategy.STEPS and (last or step % state.save_steps == 0):
            control.should_save = True
        if last:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask for what is due by epochs."""
        if args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True
        if args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_evaluate = True
        if args.save_strategy == SaveStrategy.EPOCH:
            control.should_save = True


class PrinterCallback(TrainerCallback):
    """Prints logs, one line each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Print."""
        if logs and state.is_local_process_zero:
            print(readable(logs))  # noqa: T201


def readable(logs: dict[str, Any]) -> dict[str, Any]:
    """Logs with four digits, for people.

    >>> readable({"loss": 0.123456, "total_flos": 0.0})
    {'loss': '0.1235'}
    """
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in logs.items() if name != "total_flos"}


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Ends training when evaluations stop getting better by `metric_for_best_model`.

    Args:
        early_stopping_patience: how many evaluations in a row may be no better than the best one.
        early_stopping_threshold: by how much a better one must be better.

    Raises:
        ArgumentError: the arguments of the run do not say what better means, or it has no evaluations.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Check that it can work."""
        if args.metric_for_best_model is None:
            raise ArgumentError("EarlyStoppingCallback needs metric_for_best_model in the arguments, such as 'loss'.")
        if args.eval_strategy == IntervalStrategy.NO:
            raise ArgumentError("EarlyStoppingCallback needs evaluations: use eval_strategy='steps' or 'epoch'.")
        if not args.load_best_model_at_end:
            logger.warning("EarlyStoppingCallback without load_best_model_at_end=True: training ends with the last weights.")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> Any:
        """Count evaluations without progress."""
        value = (metrics or {}).get(best_metric_name(args))
        if value is None:
            logger.warning("Early stopping found no %s among %s.", best_metric_name(args), sorted(metrics or {}))
            return
        best = state.best_metric  # that of the evaluations before this one
        gain = None if best is None else (value - best if args.greater_is_better else best - value)
        better = gain is None or gain > (self.early_stopping_threshold or 0.0)
        self.early_stopping_patience_counter = 0 if better else self.early_stopping_patience_counter + 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """What checkpoints keep."""
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }


def best_metric_name(args: Any) -> str:
    """`metric_for_best_model` as it stands in the metrics of an evaluation.

    >>> best_metric_name(TrainingArguments(metric_for_best_model="loss"))
    'eval_loss'
    """
    name = str(args.metric_for_best_model)
    return name if name.startswith("eval_") else f"eval_{name}"


def export_callbacks(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The states of those callbacks that have one, by class name."""
    states: dict[str, Any] = {}
    for callback in callbacks:
        if callable(getattr(callback, "state", None)):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: found[0] if len(found) == 1 else found for name, found in states.items()}


def restore_callbacks(callbacks: Iterable[Any], states: dict[str, Any]) -> None:
    """Set what `export_callbacks` gave; constructor arguments stay those of the callbacks at hand."""
    left = {name: list(found) if isinstance(found, list) else [found] for name, found in states.items()}
    for callback in callbacks:
        if callable(getattr(callback, "state", None)) and left.get(type(callback).__name__):
            for name, value in left[type(callback).__name__].pop(0).get("attributes", {}).items():
                setattr(callback, name, value)
