"""Values of a JSON file, compared with the types that a run needs before it uses them."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar, get_args, get_origin

from fts.errors import CheckpointError
from fts.storage.json_io import MAX_INT64, short_repr

T = TypeVar("T")


def check_type(value: Any, hint: Any, where: str) -> Any:
    """The value, if it is of a type.

    Args:
        value: what JSON gave.
        hint: the type, such as `dict[str, float]`.
        where: the file and the place in it, for the error.

    Raises:
        CheckpointError: it is not.

    >>> check_type({"loss": 1}, dict[str, float], "progress.json")
    {'loss': 1}
    >>> check_type({"loss": None}, dict[str, float], "progress.json")
    Traceback (most recent call last):
        ...
    fts.errors.CheckpointError: progress.json is damaged: {'loss': None} must be dict[str, float]. Use an earlier checkpoint.
    """
    if not matches_type(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
        raise CheckpointError(f"{where} is damaged: {short_repr(value)} must be {wanted}. Use an earlier checkpoint.")
    return value


def structure(cls: type[T], values: Any, where: str) -> T:
    """An instance of an attrs class or dataclass, made of what JSON has of its attributes.

    Args:
        cls: its annotations say what each must be; its validators may raise ValueError.
        values: attributes by name.
        where: the file and the place in it, for the error.

    Raises:
        CheckpointError: an attribute is missing or unknown, or of another type.

    >>> from fts.storage import FileChecksum
    >>> structure(FileChecksum, {"size": 1, "digest": "0f"}, "manifest.json")
    Written(size=1, digest='0f')
    """
    hints = typing.get_type_hints(cls)
    for name, value in check_type(values, dict[str, Any], where).items():
        check_type(value, hints.get(name, Any), f"{name} of {where}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} was damaged, or written by another version of fts: {error}.") from error


def matches_type(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type; whole numbers are floats, too, and none may have more than 64 bits.

    >>> matches_type(1, float), matches_type(True, int), matches_type(2**64, int), matches_type([1, "a"], list[int | str])
    (True, False, False, True)
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, part) for part in parts)
    if hint in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and -MAX_INT64 - 1 <= value <= MAX_INT64
        return whole or (hint is float and isinstance(value, float))
    if origin is list:
        return isinstance(value, list) and all(matches_type(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(matches_type(item, parts[1]) for item in value.values())
    return isinstance(value, types.NoneType if hint is None else hint)
