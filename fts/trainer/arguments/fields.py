"""How an argument is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def arg(default: Any, text: str, **options: Any) -> Any:
    """A field with its explanation, which a command-line parser shows.

    Args:
        default: a list makes each object its own one.
        text: what the argument does.
        options: more for the parser, such as `nargs`; or of the field: `repr`.
    """
    shown = options.pop("repr", True)
    metadata = {"help": text, **options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata, repr=shown)
    return field(default=default, metadata=metadata, repr=shown)


BARE = {"nargs": "?", "const": True}
"""For a parser: the name alone on the command line means True."""
