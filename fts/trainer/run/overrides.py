"""Which methods of the Trainer are overridden."""

from __future__ import annotations

from typing import Any


def overridden(trainer: Any, *names: str) -> bool:
    """Whether any of these methods is the user's: of a subclass, or set on the instance.

    The step that a run takes is composed of the overridden methods, and of fast functions in the place of all others.

    >>> from types import SimpleNamespace
    >>> overridden(SimpleNamespace(log=print), "log")
    True
    """
    return any(not _is_ours(getattr(trainer, name)) for name in names)


def _is_ours(method: Any) -> bool:
    function = getattr(method, "__func__", method)
    return str(getattr(function, "__module__", "")).startswith("fts.trainer.")
