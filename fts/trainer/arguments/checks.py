"""Checks of single arguments: each error names the argument, its value and the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from enum import Enum
from typing import Any, TypeVar

from fts.errors import ArgumentError

E = TypeVar("E", bound=Enum)


def closest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to a given one, if any is similar.

    >>> closest_name("sed", ["seed", "bf16"])
    'seed'
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def check_known_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ArgumentError for the first name that is not known, with the closest known one.

    >>> check_known_names("Arguments", ["sed"], ["seed", "bf16"])
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: Arguments has no argument 'sed'. Did you mean 'seed'?
    """
    known = list(known)
    for name in given:
        if name not in known:
            closest = closest_name(name, known)
            hint = f"Did you mean {closest!r}?" if closest else f"It has: {', '.join(sorted(known))}."
            raise ArgumentError(f"{owner} has no argument {name!r}. {hint}")


def check_enum(name: str, value: Any, choices: type[E]) -> E:
    """The member of an enum that a value names.

    >>> from fts.trainer.arguments.enums import IntervalStrategy
    >>> check_enum("eval_strategy", "epoch", IntervalStrategy)
    <IntervalStrategy.EPOCH: 'epoch'>
    """
    try:
        return choices(getattr(value, "value", value))  # also a member of transformers' enum of that name
    except ValueError:
        raise _unknown_value(name, value, [str(member.value) for member in choices]) from None


def check_one_of(name: str, value: Any, values: Iterable[str]) -> str:
    """The value, if it is one of several strings.

    >>> check_one_of("log_level", "inf", ["debug", "info"])
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: log_level='inf' is unknown. Use one of 'debug', 'info'. Did you mean 'info'?
    """
    values = list(values)
    if isinstance(value, str) and value in values:
        return value
    raise _unknown_value(name, value, values)


def _unknown_value(name: str, value: Any, values: list[str]) -> ArgumentError:
    closest = closest_name(value, values) if isinstance(value, str) else None
    hint = f" Did you mean {closest!r}?" if closest else ""
    return ArgumentError(f"{name}={value!r} is unknown. Use one of {', '.join(map(repr, values))}.{hint}")


def check_int(name: str, value: Any, low: int, remedy: str = "", *, bits: int = 0) -> int:
    """The value as an int, if it is an integer of at least `low`, and of at most `bits` bits if that is given.

    >>> check_int("seed", 3, 0)
    3
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (bits and value >> bits):
        most = f" and below 2**{bits}" if bits else ""
        raise ArgumentError(f"{name}={value!r} must be a whole number of at least {low}{most}.{' ' + remedy if remedy else ''}")
    return operator.index(value)


def check_bool(name: str, value: Any, *, or_none: bool = False) -> None:
    """Raise ArgumentError unless the value is True or False, or None where that is allowed.

    >>> check_bool("bf16", "False")
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: bf16='False' must be True or False. It is a str; write it without quotes.
    """
    if isinstance(value, bool) or (or_none and value is None):
        return
    hint = " It is a str; write it without quotes." if isinstance(value, str) else ""
    raise ArgumentError(f"{name}={value!r} must be {'True, False or None' if or_none else 'True or False'}.{hint}")


def check_str(name: str, value: Any, remedy: str = "") -> str:
    """The value, if it is a non-empty string."""
    if isinstance(value, str) and value:
        return value
    raise ArgumentError(f"{name}={value!r} must be a string.{' ' + remedy if remedy else ''}")


def check_float(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, open_low: bool = False, open_high: bool = True
) -> None:
    """Raise ArgumentError unless the value is a finite number between `low` and `high`."""
    is_finite = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_finite or value < low or value > high or (open_low and value == low) or (open_high and value == high):
        least = f"above {low:g}" if open_low else f"of at least {low:g}"
        most = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high:g}"
        hint = f" It is a {type(value).__name__}; convert it with float(...)." if isinstance(value, str) else ""
        raise ArgumentError(f"{name}={value!r} must be a number {least}{most}.{hint}")


def check_interval(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise ArgumentError unless the value is a whole number of steps, or a share of all steps below 1."""
    check_float(name, value, open_low=not zero)
    if value >= 1 and value != int(value):
        raise ArgumentError(f"{name}={value!r} must be a whole number of steps, or a share of all steps below 1.")
