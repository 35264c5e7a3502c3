"""The states of callbacks, to and from checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fts.errors import ArgumentError, CheckpointError
from fts.trainer.callbacks.state import (is_exportable, export_states)

logger = logging.getLogger(__name__)


def export_callbacks(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The states of those callbacks that have one, by class name; a list where there are several of a class.

    Args:
        callbacks: those of the run, and its control object.

    Raises:
        ArgumentError: a state is not a dictionary that JSON can hold.

    >>> from fts.trainer import EarlyStoppingCallback, PrinterCallback
    >>> list(export_callbacks([PrinterCallback(), EarlyStoppingCallback()]))
    ['EarlyStoppingCallback']
    """
    return export_states(callback for callback in callbacks if is_exportable(callback))


def states_to_save(callbacks: Iterable[Any]) -> dict[str, Any]:
    """As `export_callbacks`, but {} stands for a state that JSON cannot hold, with a warning.

    A checkpoint without it is better than none, and others of its class keep their places.

    Args:
        callbacks: those of the run, and its control object.
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
        logger.warning("The checkpoint is written without the state of a callback, which begins anew on resume. %s", error)
        return {}


def restore_callbacks(callbacks: list[Any], states: Mapping[str, Any], *, arguments: bool = False) -> None:
    """Set what `export_callbacks` gave, so that a resumed run counts on where it was.

    Attributes are restored in any case, and the constructor's arguments stay those of the callbacks at hand, unless `arguments`
    says otherwise. (transformers restores neither by default. Control flags need no restoring: each is for the step that set it.)

    Args:
        callbacks: those of the run; changed in place.
        states: by class name.
        arguments: whether the constructor's arguments, too, are the checkpoint's (`restore_callback_states_from_checkpoint`): a
            new callback then stands in the place of the one at hand.

    Raises:
        CheckpointError: a state cannot be restored.
    """
    if not isinstance(states, Mapping):
        raise CheckpointError(f"The checkpoint's states of callbacks are {states!r:.80}; they must be an object.")
    left = {name: list(found) if isinstance(found, list) else [found] for name, found in states.items()}
    for index, callback in enumerate(callbacks):
        name = type(callback).__name__
        if is_exportable(callback) and left.get(name):
            callbacks[index] = _restore(callback, left[name].pop(0), arguments)
    unused = sorted(name for name, found in left.items() if found and name != "TrainerControl")
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
