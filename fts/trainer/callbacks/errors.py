"""Exceptions of callbacks, with the callback, the event and the step."""

from __future__ import annotations

from typing import Any

from fts.errors import CallbackError


def callback_error(callback: Any, event: str, state: Any, error: Exception) -> CallbackError:
    """An error that names the callback, the event and the step, to be raised `from` the original one.

    It is also an instance of the original error's class, so that code which catches that class (such as a search that prunes by
    an exception) still works.

    Args:
        callback: the callback that raised the error.
        event: the method that raised it.
        state: has the step.
        error: the original error.

    Returns:
        The error; the original one itself if it is a CallbackError already, as when a callback evaluates and another one fails.

    >>> failed = callback_error(object(), "on_log", None, KeyError("loss"))
    >>> print(failed)
    object.on_log failed at step 0: KeyError: 'loss'
    >>> isinstance(failed, CallbackError), isinstance(failed, KeyError)
    (True, True)
    """
    if isinstance(error, CallbackError):
        return error
    step = getattr(state, "global_step", 0)
    message = f"{type(callback).__name__}.{event} failed at step {step}: {type(error).__name__}: {error}"
    named = _combined_class(type(error))(message)
    named.__dict__.update(error.__dict__)
    return named


def _combined_class(original: type[Exception]) -> type[CallbackError]:
    # the original class may format its own message, and is not found by pickle under its new name
    own = {
        "__str__": Exception.__str__,
        "__reduce__": lambda self: (CallbackError, self.args),
        "__module__": CallbackError.__module__,
    }
    try:
        return type("CallbackError", (CallbackError, original), own)
    except TypeError:  # a class that cannot be combined with others
        return CallbackError
