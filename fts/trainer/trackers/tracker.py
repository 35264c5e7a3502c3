"""The open run of a tracker, and what a tracker gets to open one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from fts.trainer.trackers.logs import rewrite_logs

GLOBAL_STEP = "train/global_step"
"""The name of the number of updates in the metrics of a tracker that counts its own steps."""


@attrs.frozen
class RunInfo:
    """What a tracker gets to open a run.

    Attributes:
        args: the arguments of the run.
        step: the update that the run starts at.
        run_id: of the run to continue; None starts a new one.
        name: of the run; None if it has none.
        project: of the run.
        config: the configuration to store.
    """

    args: Any
    step: int = 0
    run_id: str | None = None
    name: str | None = None
    project: str = "huggingface"
    config: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.define
class TrackerRun:
    """The open run of a tracker.

    Attributes:
        tracker: has the methods of an `accelerate.tracking.GeneralTracker`.
        run_id: by which a resumed run finds this one; None if the tracker cannot continue a run.
        rewrite: maps the names of logs to those of the tracker.
        has_config: whether it was opened with the configuration.
        counts_steps: whether it counts its own steps: then the number of updates is one of the metrics.
        finish: ends the run; None if the script or the job started it.
        fail: ends it as failed, if the tracker distinguishes this.
    """

    tracker: Any
    run_id: str | None = None
    rewrite: Callable[[Mapping[str, float]], dict[str, float]] = rewrite_logs
    has_config: bool = False
    counts_steps: bool = False
    finish: Callable[[], object] | None = None
    fail: Callable[[], object] | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""
        rewritten = self.rewrite(metrics)
        if self.counts_steps:
            self.tracker.log({**rewritten, GLOBAL_STEP: step})
        else:
            self.tracker.log(rewritten, step=step)

    def close(self, failed: bool = False) -> None:
        """End the run, unless the script or the job started it."""
        end = self.fail if failed and self.fail is not None else self.finish
        if end is not None:
            end()
