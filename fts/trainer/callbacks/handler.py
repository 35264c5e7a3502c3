"""The list of callbacks, and the dispatch of events to them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from typing import Any

from fts.errors import ArgumentError, CallbackError
from fts.trainer.callbacks.base import EVENTS, overrides
from fts.trainer.callbacks.errors import callback_error

logger = logging.getLogger(__name__)

CONTEXT = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
"""The keyword arguments that every event gets."""


class CallbackHandler:
    """Calls the callbacks that override an event, in order.

    Each event is also a method, `on_...(args, state, control, **kwargs)`, that clears the control flags which the event answers.

    Args:
        callbacks: instances or classes.
        model: passed to each event under this name, as are the following.
        processing_class: the tokenizer or processor.
        optimizer: the optimizer.
        lr_scheduler: the learning-rate scheduler.

    Attributes:
        callbacks: the list of instances; it may be changed in place.
        train_dataloader: passed to each event under this name.
        eval_dataloader: the same.
        listeners: for each event the callbacks that override it.

    >>> from fts.trainer.callbacks import DefaultFlowCallback
    >>> CallbackHandler([DefaultFlowCallback], None, None, None, None).callback_list
    'DefaultFlowCallback'
    """

    def __init__(
        self,
        callbacks: Iterable[Any],
        model: Any = None,
        processing_class: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
    ) -> None:
        self.model = model
        self.processing_class = processing_class
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.train_dataloader: Any = None
        self.eval_dataloader: Any = None
        self.callbacks: list[Any] = []
        self.listeners: dict[str, tuple[Any, ...]] = dict.fromkeys(EVENTS, ())
        self._listed: list[Any] = []
        for callback in callbacks:
            self.add_callback(callback)
        if not any(_has_class_name(callback, "DefaultFlowCallback") for callback in self.callbacks):
            logger.warning(
                "No callback is a DefaultFlowCallback: nothing requests logs, evaluations, checkpoints or the end of training. "
                "Add one before you train: trainer.add_callback(DefaultFlowCallback). The callbacks are:\n%s",
                self.callback_list,
            )

    @property
    def callback_list(self) -> str:
        """The names of the callbacks' classes, one a line."""
        return "\n".join(type(callback).__name__ for callback in self.callbacks)

    def add_callback(self, callback: Any) -> None:
        """Add a callback, given as an instance or a class, after the others.

        Raises:
            ArgumentError: it has none of the events' methods, or it is a class whose instances need arguments.
        """
        instance = _instantiate(callback)
        if not any(hasattr(instance, event) for event in EVENTS):
            raise ArgumentError(f"{type(instance).__name__} is no callback: it has none of the methods {', '.join(EVENTS)}.")
        if any(type(other) is type(instance) or _is_counterpart(other, type(instance)) for other in self.callbacks):
            logger.warning(
                "The Trainer already has a callback of class %s; now it has two. The callbacks were:\n%s",
                *(type(instance), self.callback_list),
            )
        _warn_of_unknown_events(type(instance))
        self.callbacks.append(instance)
        self._find_listeners()

    def pop_callback(self, callback: Any) -> Any:
        """Remove the first callback that is, or is an instance of, the given one, and return it; None if there is none."""
        for index, other in enumerate(self.callbacks):
            if _matches(other, callback) if isinstance(callback, type) else other == callback:
                found = self.callbacks.pop(index)
                self._find_listeners()
                return found
        return None

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, given as an instance or a class.

        Raises:
            ArgumentError: an instance is not there.
        """
        if self.pop_callback(callback) is None and not isinstance(callback, type):
            names = self.callback_list.replace("\n", ", ")
            raise ArgumentError(f"There is no such callback to remove: {callback!r}. The callbacks are: {names}.")

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Call the callbacks that override an event.

        Args:
            event: the name of the method.
            args: the arguments of the run.
            state: the state of the run.
            control: the flags that callbacks may set.
            kwargs: the event's own keyword arguments, such as `logs`.

        Returns:
            The control object, or the one that a callback returned in its place.

        Raises:
            CallbackError: a callback raised, or returned something else.
        """
        # methods may be replaced between runs, and the list changed at any time
        changed = event == "on_train_begin" or [*map(id, self._listed)] != [*map(id, self.callbacks)]
        if changed or event not in self.listeners:
            self.listeners.setdefault(event, ())
            self._find_listeners()
        if not self.listeners[event]:
            return control
        kwargs = self.context | kwargs
        for callback in self.listeners[event]:
            try:
                result = getattr(callback, event)(args, state, control, **kwargs)
            except Exception as error:
                raise callback_error(callback, event, state, error) from error
            if result is not None:
                control = _check_result(result, callback, event)
        return control

    @property
    def context(self) -> dict[str, Any]:
        """The keyword arguments that every event gets; settable."""
        return {name: getattr(self, name) for name in CONTEXT}

    @context.setter
    def context(self, context: dict[str, Any]) -> None:
        for name, value in context.items():
            setattr(self, name, value)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The Trainer was created."""
        return self.call_event("on_init_end", args, state, control, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training begins; a request to stop the last one is cleared."""
        control.should_training_stop = False
        return self.call_event("on_train_begin", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training ends."""
        return self.call_event("on_train_end", args, state, control, **kwargs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A pass over the data begins."""
        control.should_epoch_stop = False
        return self.call_event("on_epoch_begin", args, state, control, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A pass over the data ends."""
        return self.call_event("on_epoch_end", args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An update begins."""
        control.should_log = control.should_evaluate = control.should_save = False
        return self.call_event("on_step_begin", args, state, control, **kwargs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A micro-batch that is not the last of its update is done."""
        return self.call_event("on_substep_end", args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The gradients are computed."""
        return self.call_event("on_pre_optimizer_step", args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The parameters are updated."""
        return self.call_event("on_optimizer_step", args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An update is done; callbacks get its `metrics` as tensors if they are given."""
        return self.call_event("on_step_end", args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> Any:
        """An evaluation is done."""
        control.should_evaluate = False
        return self.call_event("on_evaluate", args, state, control, metrics=metrics, **kwargs)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> Any:
        """A prediction is done."""
        return self.call_event("on_predict", args, state, control, metrics=metrics, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A checkpoint is written."""
        control.should_save = False
        return self.call_event("on_save", args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> Any:
        """Metrics were logged."""
        control.should_log = False
        return self.call_event("on_log", args, state, control, logs=logs, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A batch of evaluation or prediction is done."""
        return self.call_event("on_prediction_step", args, state, control, **kwargs)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An upload begins."""
        return self.call_event("on_push_begin", args, state, control, **kwargs)

    def _find_listeners(self) -> None:
        self._listed = list(self.callbacks)
        for event in self.listeners:
            self.listeners[event] = tuple(callback for callback in self.callbacks if overrides(callback, event))


def _instantiate(callback: Any) -> Any:
    if not isinstance(callback, type):
        return callback
    try:
        return callback()
    except TypeError as error:
        raise ArgumentError(
            f"The callback {callback.__name__} cannot be created without arguments ({error}): give an instance."
        ) from error


def _matches(callback: Any, wanted: type) -> bool:
    return isinstance(callback, wanted) or _is_counterpart(callback, wanted)


def _is_counterpart(callback: Any, wanted: type) -> bool:
    # Scripts import PrinterCallback and the like from transformers, and mean the Trainer's own.
    return wanted.__module__ == "transformers.trainer_callback" and any(
        base.__name__ == wanted.__name__ and base.__module__.startswith("fts.trainer.callbacks.")
        for base in type(callback).__mro__
    )


def _has_class_name(callback: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(callback).__mro__)


def _warn_of_unknown_events(kind: type) -> None:
    for name in dir(kind):
        if name.startswith("on_") and name not in EVENTS and callable(getattr(kind, name)):
            matches = difflib.get_close_matches(name, EVENTS, n=1)
            hint = f"Did you mean {matches[0]}?" if matches else f"The events are: {', '.join(EVENTS)}."
            logger.warning("%s.%s is never called: there is no such event. %s", kind.__name__, name, hint)


def _check_result(result: Any, callback: Any, event: str) -> Any:
    if not hasattr(result, "should_training_stop"):
        raise CallbackError(
            f"{type(callback).__name__}.{event} returned {result!r}; it must return nothing, or a control object."
        )
    return result
