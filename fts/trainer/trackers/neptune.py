"""Metrics of a Neptune run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import attrs

from fts.trainer.trackers.tracker import RunInfo, TrackerRun


@attrs.frozen
class Neptune:
    """A tracker for a Neptune run; its names are under "finetuning".

    Attributes:
        run: a `neptune.Run`.
    """

    run: Any

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Store the configuration of a run."""
        for name, value in values.items():
            self.run[f"finetuning/parameters/{name}"] = value

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics."""
        for name, value in values.items():
            self.run[f"finetuning/{name}"].append(value, step=step)


def neptune(info: RunInfo) -> TrackerRun:
    """A Neptune run; `NEPTUNE_PROJECT`, `NEPTUNE_API_TOKEN` and `NEPTUNE_MODE` apply."""
    import neptune

    options = {"with_id": info.run_id, "name": info.name, "project": os.environ.get("NEPTUNE_PROJECT")}
    run = neptune.init_run(**{name: value for name, value in options.items() if value is not None})
    run_id = run["sys/id"].fetch() if os.environ.get("NEPTUNE_MODE", "async") in ("async", "sync") else None
    return TrackerRun(Neptune(run), run_id, finish=run.stop)
