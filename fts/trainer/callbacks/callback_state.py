"""Saving the states of callbacks in checkpoints, and restoring them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fts.errors import ArgumentError, CheckpointError
from fts.trainer.callbacks.state import export_states, is_exportable

logger = logging.getLogger(__name__)


def export_callbacks(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The states of the callbacks that have one, by class name; a list where several have the same class.

    Args:
        callbacks: the callbacks of the run, and its control object.

    Raises:
        ArgumentError: a state is not a dictionary that JSON can hold.

    >>> from fts.trainer import EarlyStoppingCallback, PrinterCallback
    >>> list(export_callbacks([PrinterCallback(), EarlyStoppingCallback()]))
    ['EarlyStoppingCallback']
    """
    return export_states(callback for callback in callbacks if is_exportable(callback))


def states_to_save(callbacks: Iterable[Any]) -> dict[str, Any]:
    """As `export_callbacks`, but a state that JSON cannot hold becomes {}, with a warning.

    A checkpoint without it is better than none, and other callbacks of its class keep their places.

    Args:
        callbacks: the callbacks of the run, and its control object.
    """
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        if is_exportable(callback):
            states.setdefault(type(callback).__name__, []).append(_state_or_empty(callback))
    return {name: found[0] if len(found) == 1 else found for name, found in states.items()}


def _state_or_empty(callback: Any) -> dict[str, Any]:
    try:
        return dict(export_states([callback])[type(callback).__name__])
    except ArgumentError as error:
        logger.warning("The checkpoint is written without the state of a callback, which starts anew on resume. %s", error)
        return {}


def restore_callbacks(callbacks: list[Any], states: Mapping[str, Any], *, arguments: bool = False) -> None:
    """Restore what `export_callbacks` returned.

    Attributes are always restored; constructor arguments stay those of the present callbacks unless `arguments` is True.
    (transformers restores neither by default. Control flags are not restored: each is for the step that set it.)

    Args:
        callbacks: the callbacks of the run; changed in place.
        states: by class name.
        arguments: whether to restore the constructor's arguments, too (`restore_callback_states_from_checkpoint`): a new
            callback then replaces the present one.

    Raises:
        CheckpointError: a state cannot be restored.
    """
    if not isinstance(states, Mapping):
        raise CheckpointError(f"The checkpoint's states of callbacks are {states!r:.80}; they must be an object.")
    remaining = {name: list(found) if isinstance(found, list) else [found] for name, found in states.items()}
    for index, callback in enumerate(callbacks):
        name = type(callback).__name__
        if is_exportable(callback) and remaining.get(name):
            callbacks[index] = _restore(callback, remaining[name].pop(0), arguments)
    unused = sorted(name for name, found in remaining.items() if found and name != "TrainerControl")
    if unused:
        logger.warning(
            "The checkpoint has states of callbacks that this run does not have; they are not used: %s.", ", ".join(unused)
        )


def _restore(callback: Any, state: Any, arguments: bool) -> Any:
    try:
        restored = type(callback)(**state.get("args", {})) if arguments and state else callback
        for name, value in state.get("attributes", {}).items():
            setattr(restored, name, value)
    except (TypeError, AttributeError, ValueError) as error:
        hint = " Use restore_callback_states_from_checkpoint=False to keep the constructor's arguments." if arguments else ""
        raise CheckpointError(
            f"The checkpoint's state of {type(callback).__name__} cannot be restored: {error}.{hint}"
        ) from error
    return restored
