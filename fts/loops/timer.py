"""Things that are due by the clock."""

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
"""From this process's number to the greatest of all processes."""


def single_process(number: int) -> int:
    """What one process agrees on: its own number."""
    return number


@attrs.define(eq=False)
class Timer:
    """Whether so many seconds have gone by since it was made, or last reset; made by `every_interval`.

    Attributes:
        seconds: the interval.
        clock: gives the time.
        agree: combines the answers of all processes at each `due`, so that all save at the same step. Every process
            must ask at the same places.
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
        """Begin the interval now: what it is for was just done."""
        self.since = self.clock()


def every_interval(interval: float | str | timedelta, *, clock: Clock = time.monotonic, agree: Agree = single_process) -> Timer:
    """A timer to ask after each step, and to reset after each save, whatever that was for.

    Args:
        interval: seconds, or as `parse_duration` reads it: "20min", a `timedelta`.
        clock: gives the time, in seconds.
        agree: see `Timer`.

    Returns:
        The timer; its first interval begins now.

    Raises:
        ArgumentError: the interval cannot be read, or is not positive.

    >>> now = 0.0
    >>> timer = every_interval("20min", clock=lambda: now)
    >>> now = 1200.0
    >>> timer.due(), timer.reset(), timer.due()
    (True, None, False)
    """
    seconds = parse_duration(interval)
    if seconds == 0:
        raise ArgumentError(f'{interval!r} is no interval: it must be longer than 0 seconds, such as "20min".')
    return Timer(seconds, clock, agree)
