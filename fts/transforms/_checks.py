"""Checks of hyper-parameters, made once when a transform or a schedule is built."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fts.errors import ArgumentError, FtsError
from fts.typing import Params, Transform


def check_number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    open_low: bool = False,
    error: type[FtsError] = ArgumentError,
) -> None:
    """Raise unless `value` is a finite number in `[low, high)`, or in `(low, high)` with `open_low`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value < high or (open_low and value == low):
        raise error(
            f"{name} must be a number in {'(' if open_low or low == -math.inf else '['}{low:g}, {high:g}), not {value!r}."
        )


def check_decays(function: str, **decays: Any) -> None:
    """Raise unless the hyper-parameters are numbers in [0, 1)."""
    for name, value in decays.items():
        check_number(f"{function}: {name}", value, high=1.0)


def check_numbers(function: str, **numbers: Any) -> None:
    """Raise unless the hyper-parameters are finite numbers that are not negative."""
    for name, value in numbers.items():
        check_number(f"{function}: {name}", value)


def check_count(name: str, value: Any, *, low: int = 0, error: type[FtsError] = ArgumentError) -> None:
    """Raise unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise error(f"{name} must be an integer of at least {low}, not {value!r}.")


def check_integer(name: str, value: Any) -> None:
    """Raise unless `value` is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"{name} must be an integer, not {value!r}.")


def check_transform(function: str, transform: Any) -> None:
    """Raise unless it is a transform."""
    if not isinstance(transform, Transform):
        raise ArgumentError(
            f"{function} takes transforms, not {transform!r}. Was the function that makes one not called, as in `sgd(0.1)`?"
        )


def need_params(params: Params | None, transform: str) -> Params:
    """The parameters, or an error that says which transform needs them."""
    if params is None:
        raise ArgumentError(f"{transform} needs the parameters: call update(grads, state, params) with params instead of None.")
    return params


def format_value(value: Any) -> str:
    """A hyper-parameter as it stands in a label: a number, a schedule's description, a function's name."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, (int, float, str)):
        return f"{value}"
    description = getattr(value, "description", None)
    if isinstance(description, str):
        return description
    return getattr(value, "__name__", type(value).__name__)


def format_label(function: str, *values: Any, **named: Any) -> str:
    """The label of a transform: its function with hyper-parameters, without those that are None or False.

    >>> format_label("sgd", lr=0.1, momentum=None, nesterov=True)
    'sgd(lr=0.1, nesterov)'
    """
    words = [format_value(value) for value in values]
    for name, value in named.items():
        if value is not None and value is not False:
            words.append(name if value is True else f"{name}={format_value(value)}")
    return f"{function}({', '.join(words)})"
