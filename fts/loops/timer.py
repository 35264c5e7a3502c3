"""Timers for saving by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeAlias

import attrs

from fts.errors import ArgumentError
from fts.loops.durations import parse_duration

Clock: TypeAlias = Callable[[], float]
"""Seconds since some moment, such as `time.monotonic`."""

Agree: TypeAlias = Callable[[int], int]
"""An all-reduce: from this process's number to the maximum over all processes."""


def single_process(number: int) -> int:
    """The `Agree` of a single process: the number itself."""
    return number


@attrs.define(eq=False)
class Timer:
    """Whether so many seconds have passed since it was made, or last reset; made by `every_interval`.

    Attributes:
        seconds: the interval.
        clock: returns the time.
        agree: all-reduces the result of each `due`, so that all processes save at the same step. All must call `due` at the
            same places.
        since: when the interval began, by the clock.
    """

    seconds: float
    clock: Clock = time.monotonic
    agree: Agree = single_process
    since: float = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.reset()

    def due(self) -> bool:
        """Whether the interval is over; it stays so until `reset`."""
        return bool(self.agree(int(self.clock() - self.since >= self.seconds)))

    def reset(self) -> None:
        """Restart the interval."""
        self.since = self.clock()


def every_interval(interval: float | str | timedelta, *, clock: Clock = time.monotonic, agree: Agree = single_process) -> Timer:
    """A timer to check after each step, and to reset after each save.

    Args:
        interval: see `parse_duration`: seconds, "20min", a `timedelta`.
        clock: returns the time, in seconds.
        agree: see `Timer`.

    Returns:
        The timer; its first interval begins now.

    Raises:
        ArgumentError: the interval cannot be parsed, or is not positive.

    >>> now = 0.0
    >>> timer = every_interval("20min", clock=lambda: now)
    >>> now = 1200.0
    >>> timer.due(), timer.reset(), timer.due()
    (True, None, False)
    """
    seconds = parse_duration(interval)
    if seconds == 0:
        raise ArgumentError(f'{interval!r} is not an interval: it must be longer than 0 seconds, such as "20min".')
    return Timer(seconds, clock, agree)
