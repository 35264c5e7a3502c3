"""Learning rates: constants, tensors or schedules; evaluated, reported and checked in one way by all transforms."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fts.errors import ScheduleError
from fts.transforms._checks import check_number, format_value
from fts.transforms._info import values_of
from fts.transforms._scalars import as_scalar, constant, readable
from fts.typing import Info, Number, Schedule

Rate: TypeAlias = float | Tensor | Schedule
"""A learning rate: a number, a 0-d tensor (to differentiate or vmap over it), or a schedule."""


def check_rate(name: str, rate: Rate) -> None:
    """Raise `ArgumentError` for a constant rate that is negative or not finite."""
    if not callable(rate) and not isinstance(rate, Tensor):
        check_number(name, rate)


def rate_at(rate: Rate, count: Any) -> Number:
    """The rate after `count` updates: as it is for a tensor, in pure updates, and checked for a number, in fast paths."""
    if not callable(rate):
        return rate
    value = rate(count)
    if isinstance(count, Tensor):
        return value  # type: ignore[no-any-return]
    value = float(value)
    if not 0.0 <= value < math.inf:
        raise ScheduleError(_complaint(f"The schedule {format_value(rate)} returned {value} at step {count}"))
    return value


def rate_now(rate: Rate, count: Tensor) -> Number:
    """The rate after `count` updates, for fast paths: a checked Python number where the counter is on the CPU."""
    return rate_at(rate, readable(count)) if callable(rate) else rate


def report(rate: Number, device: torch.device) -> Tensor:
    """The rate as an entry of info."""
    return as_scalar(rate.detach() if isinstance(rate, Tensor) else rate, device)


def report_now(schedule: Rate, rate: Number, device: torch.device) -> Tensor:
    """The rate as an entry of info, for fast paths: a constant is made a tensor only once."""
    if isinstance(schedule, (int, float)):
        return constant(schedule, device)
    return report(rate, device)


def checking(rate: Rate) -> Any:
    """The `check` of a transform with this rate: None for a number, which was checked when the transform was built."""
    return None if isinstance(rate, (int, float)) else check_rates


def check_rates(info: Info) -> None:
    """Raise `ScheduleError` if a reported rate is negative or not finite."""
    for key, rate in values_of(info, "lr"):
        value = float(rate)
        if not 0.0 <= value < math.inf:
            raise ScheduleError(_complaint(f"The learning rate reported as {key!r} is {value}"))


def _complaint(what: str) -> str:
    return f"{what}; a learning rate must be finite and not negative. Check the schedule's values and its number of steps."
