"""Reading and validating JSON objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fts.errors import CheckpointError
from fts.storage.files import resolve_file

MAX_INT64 = 2**63 - 1
"""The largest integer that an int64 counter can hold."""


def read_json(directory: Path, name: str, *, version: int | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        directory: that contains the file.
        name: of the file.
        version: the required "format"; None where it has none.

    Raises:
        CheckpointError: the file is missing, outside the directory or corrupt, has a duplicate key, or has another format.
    """
    path = directory / name
    try:
        document = json.loads(
            resolve_file(directory, name).read_text(encoding="utf-8"), object_pairs_hook=_dict_without_duplicates
        )
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Use an earlier checkpoint.") from error
    found = document.get("format") if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or (version is not None and (found != version or isinstance(found, bool))):
        raise CheckpointError(f"{path} has format {found!r}; this version of fts reads format {version or 'object'}.")
    return document


def get_int(path: Path, document: dict[str, Any], key: str, *, minimum: int = 0) -> int:
    """A counter of a JSON object.

    Raises:
        CheckpointError: it is missing, not an integer, less than `minimum`, or too large for int64.
    """
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= MAX_INT64:
        raise CheckpointError(f"{path} has {key} = {short_repr(value)}; an integer from {minimum} to 2**63 - 1 is needed.")
    return value


def short_repr(value: Any) -> str:
    """A short text of a value, for an error message.

    >>> short_repr(7), short_repr(2**64)
    ('7', 'a number of 65 bits')
    """
    if isinstance(value, int) and not -MAX_INT64 - 1 <= value <= MAX_INT64:
        return f"a number of {value.bit_length()} bits"
    try:
        return f"{value!r:.80}"
    except ValueError:  # it contains an integer with too many digits
        return f"a {type(value).__name__}"


def _dict_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {duplicate!r} is there twice")
    return result
