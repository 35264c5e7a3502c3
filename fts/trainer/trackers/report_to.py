"""From `report_to` to callbacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fts.trainer.arguments.trackers import chosen
from fts.trainer.trackers.callback import TrackerCallback
from fts.trainer.trackers.flyte import FlyteCallback


def tracker_callbacks(report_to: Iterable[str]) -> list[Any]:
    """The callbacks of the trackers that `report_to` names.

    Args:
        report_to: names; "all" stands for what is installed, and what of that cannot start is left out with a warning.

    >>> tracker_callbacks([])
    []
    """
    given = list(report_to)
    names = chosen(given)
    tracked = [name for name in names if name != "flyte"]
    several = [TrackerCallback(tracked, optional=[name for name in tracked if name not in given])] if tracked else []
    return [*several, *([FlyteCallback()] if "flyte" in names else [])]
