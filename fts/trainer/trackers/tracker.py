"""A tracker at work, and what it is opened with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fts.trainer.trackers.names import by_split

STEP = "train/global_step"
"""Under which name the number of updates stands among the figures, where a tracker counts its own steps."""


@attrs.frozen
class Opening:
    """What a tracker is opened with.

    Attributes:
        args: the arguments of the run.
        step: the update that the run begins at.
        run_id: of the run to go on with; None begins a new one.
        name: of the run; None where it has none.
        project: that it belongs to.
        facts: what the tracker is to know of the run.
    """

    args: Any
    step: int = 0
    run_id: str | None = None
    name: str | None = None
    project: str = "huggingface"
    facts: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.define
class Tracking:
    """A tracker at work.

    Attributes:
        tracker: has the methods of an `accelerate.tracking.GeneralTracker`.
        run_id: by which a resumed run finds this one; None where the tracker cannot go on with a run.
        rename: from the names of logs to those that the tracker shows.
        told: whether it was opened with the facts.
        counts: whether it counts its own steps: the updates are then one of the figures.
        finish: ends the run; None where it is somebody else's.
        fail: ends it as one that failed, where the tracker knows the difference.
    """

    tracker: Any
    run_id: str | None = None
    rename: Callable[[Mapping[str, float]], dict[str, float]] = by_split
    told: bool = False
    counts: bool = False
    finish: Callable[[], object] | None = None
    fail: Callable[[], object] | None = None

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of a step."""
        named = self.rename(figures)
        if self.counts:
            self.tracker.log({**named, STEP: step})
        else:
            self.tracker.log(named, step=step)

    def close(self, failed: bool = False) -> None:
        """End the run, unless somebody else began it."""
        end = self.fail if failed and self.fail is not None else self.finish
        if end is not None:
            end()
