"""Checks of the types of values in a JSON file, before a run uses them."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar, get_args, get_origin

from fts.errors import CheckpointError
from fts.storage.json_io import MAX_INT64, short_repr

T = TypeVar("T")


def check_type(value: Any, hint: Any, where: str) -> Any:
    """The value, if it has the type.

    Args:
        value: from JSON.
        hint: the type, such as `dict[str, float]`.
        where: the file and the place in it, for the error message.

    Raises:
        CheckpointError: it has another type.

    >>> check_type({"loss": 1}, dict[str, float], "progress.json")
    {'loss': 1}
    >>> check_type({"loss": None}, dict[str, float], "progress.json")
    Traceback (most recent call last):
        ...
    fts.errors.CheckpointError: progress.json is corrupt: {'loss': None} must be dict[str, float]. Use an earlier checkpoint.
    """
    if not matches_type(value, hint):
        expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
        raise CheckpointError(f"{where} is corrupt: {short_repr(value)} must be {expected}. Use an earlier checkpoint.")
    return value


def structure(cls: type[T], values: Any, where: str) -> T:
    """An instance of an attrs class or dataclass from a JSON object.

    Args:
        cls: its annotations are the types that are checked; its validators may raise ValueError.
        values: attributes by name.
        where: the file and the place in it, for the error message.

    Raises:
        CheckpointError: an attribute is missing or unknown, or has another type.

    >>> from fts.storage import FileChecksum
    >>> structure(FileChecksum, {"size": 1, "digest": "0f"}, "manifest.json")
    FileChecksum(size=1, digest='0f')
    """
    hints = typing.get_type_hints(cls)
    for name, value in check_type(values, dict[str, Any], where).items():
        check_type(value, hints.get(name, Any), f"{name} of {where}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is corrupt, or from another version of fts: {error}.") from error


def matches_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a type; integers are floats, too, and none may have more than 64 bits.

    >>> matches_type(1, float), matches_type(True, int), matches_type(2**64, int), matches_type([1, "a"], list[int | str])
    (True, False, False, True)
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, part) for part in parts)
    if hint in (int, float):
        is_int = isinstance(value, int) and not isinstance(value, bool) and -MAX_INT64 - 1 <= value <= MAX_INT64
        return is_int or (hint is float and isinstance(value, float))
    if origin is list:
        return isinstance(value, list) and all(matches_type(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches_type(item, parts[1]) for item in value.values())
    return isinstance(value, types.NoneType if hint is None else hint)
