"""Durations as text, such as "2h30m" or Slurm's "1-02:30:00"."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from fts.errors import ArgumentError

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}  # by the unit's first letter
_UNIT = "d(?:ays?)?|h(?:(?:ou)?rs?)?|m(?:in(?:ute)?s?)?|s(?:ec(?:ond)?s?)?"
_PART = re.compile(rf"(\d+(?:\.\d+)?)({_UNIT})")
_WITH_UNITS = re.compile(rf"(?:\d+(?:\.\d+)?(?:{_UNIT}))+")
_CLOCK = re.compile(r"(?:(\d+)[-:])?(\d+):(\d\d):(\d\d)")


def parse_duration(time: float | str | timedelta) -> float:
    """A duration in seconds.

    Args:
        time: seconds; a `timedelta`; or text: "2h30m", "20min", "1 hour 30 sec" with the units d, h, m and s or their names, or
            "02:30:00", "1-02:30:00", "1:02:30:00" (days, hours, minutes, seconds).

    Returns:
        Seconds.

    Raises:
        ArgumentError: it cannot be parsed, or is negative.

    >>> parse_duration("2h30m"), parse_duration("20min"), parse_duration("1-00:00:10"), parse_duration(90)
    (9000.0, 1200.0, 86410.0, 90.0)
    """
    seconds: Any = _seconds_in(time) if isinstance(time, str) else time.total_seconds() if isinstance(time, timedelta) else time
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not seconds >= 0:  # also NaN
        raise ArgumentError(f'{time!r} is not a duration. Give seconds, or text such as "2h30m", "20min" or "1-02:30:00".')
    return float(seconds)


def _seconds_in(text: str) -> float | None:
    text = text.strip().lower().replace(" ", "")
    if clock := _CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    if _WITH_UNITS.fullmatch(text):
        return sum(float(number) * _SECONDS[unit[0]] for number, unit in _PART.findall(text))
    return None
