"""Arguments that this version of fts has no code for: turning one on is an error, so that none is silently ignored.

Arguments that only configure such a feature are stored as given: without the feature they have no effect in Hugging Face's
Trainer either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.trainer.arguments.enums import DebugOption


@attrs.frozen
class Unsupported:
    """A feature that is missing.

    Attributes:
        is_on: whether a value asks for it.
        remedy: what to do instead.
    """

    is_on: Callable[[Any], bool]
    remedy: str


UNSUPPORTED: dict[str, Unsupported] = {
    "debug": Unsupported(lambda value: DebugOption.TPU_METRICS_DEBUG in value, "TPUs are not supported; leave it out."),
    "train_sampling_strategy": Unsupported(lambda value: value == "batch_rebalance", "Use 'group_by_length'."),
    "sortish_sampler": Unsupported(bool, "Use group_by_length=True, which also puts examples of similar length together."),
}
"""Argument -> what is missing; an entry goes when its code comes."""


def check_supported(name: str, value: Any, *, given: Any = None) -> None:
    """Raise ArgumentError if the value of an argument turns on what this version does not have.

    Args:
        name: the argument.
        value: the value to store.
        given: the value as it was given, for the message.

    >>> check_supported("sortish_sampler", True)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: sortish_sampler=True is not yet in this version of fts. Use group_by_length=True, which ...
    """
    missing = UNSUPPORTED.get(name)
    if missing is not None and missing.is_on(value):
        shown = value if given is None else given
        raise ArgumentError(f"{name}={getattr(shown, 'value', shown)!r} is not yet in this version of fts. {missing.remedy}")
