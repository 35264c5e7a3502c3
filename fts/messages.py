"""Parts of messages that several packages share."""

from __future__ import annotations

import sys
from collections.abc import Collection
from itertools import islice
from typing import Any

from fts.errors import MissingDependencyError

DISTRIBUTION = "fts-torch"
"""The name under which pip installs this project. The distribution `fts` on PyPI is another project with the same import name."""


def abbreviate(values: Collection[Any], shown: int = 5) -> str:
    """The first of several values, and how many more there are.

    >>> abbreviate(range(7)), abbreviate([])
    ('0, 1, 2, 3, 4 and 2 more', 'none')
    """
    more = f" and {len(values) - shown} more" if len(values) > shown else ""
    return (", ".join(map(str, islice(values, shown))) or "none") + more


def install_hint(extra: str) -> str:
    """The command that installs this project with one of its extras.

    >>> install_hint("search")
    "pip install 'fts-torch[search]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def check_installation() -> None:
    """Raise where another project's `fts/__init__.py` replaced ours, as that of the distribution `fts` on PyPI does.

    Raises:
        MissingDependencyError: with the remedy.
    """
    package = sys.modules["fts"]
    if hasattr(package, "TrainState"):
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        reason = f"The distribution 'fts' {version('fts')}, another project, is installed, and its files replaced ours."
    except PackageNotFoundError:
        reason = "Another project's files replaced ours, or removing it took ours along."
    raise MissingDependencyError(
        f"{package.__file__ or 'fts/__init__.py'} is not that of {DISTRIBUTION}. {reason} Run: pip uninstall fts, then "
        f"pip install --force-reinstall --no-deps {DISTRIBUTION}."
    )
