"""How an argument is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def arg(default: Any, text: str, **options: Any) -> Any:
    """A dataclass field with its help text, which a command-line parser shows.

    Args:
        default: the default; each instance gets its own copy of a list.
        text: what the argument does.
        options: more for the parser, such as `nargs`; or for the field: `repr`.
    """
    in_repr = options.pop("repr", True)
    metadata = {"help": text, **options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata, repr=in_repr)
    return field(default=default, metadata=metadata, repr=in_repr)


FLAG = {"nargs": "?", "const": True}
"""For a parser: the name alone on the command line means True."""
