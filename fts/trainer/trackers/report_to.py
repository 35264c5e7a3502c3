"""The callbacks of the trackers in `report_to`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fts.trainer.arguments import resolve_report_to
from fts.trainer.trackers.callback import TrackerCallback
from fts.trainer.trackers.flyte import FlyteCallback


def tracker_callbacks(report_to: Iterable[str]) -> list[Any]:
    """The callbacks of the trackers that `report_to` names.

    Args:
        report_to: names; "all" means every installed tracker, and those that cannot start are left out with a warning.

    >>> tracker_callbacks([])
    []
    """
    requested = list(report_to)
    names = resolve_report_to(requested)
    tracked = [name for name in names if name != "flyte"]
    callbacks = [TrackerCallback(tracked, optional=[name for name in tracked if name not in requested])] if tracked else []
    return [*callbacks, *([FlyteCallback()] if "flyte" in names else [])]
