"""Words of messages."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any


def some(values: Collection[Any], shown: int = 5) -> str:
    """The first of several values, and how many more there are.

    >>> some(range(7)), some([])
    ('0, 1, 2, 3, 4 and 2 more', 'none')
    """
    more = f" and {len(values) - shown} more" if len(values) > shown else ""
    return (", ".join(map(str, islice(values, shown))) or "none") + more
