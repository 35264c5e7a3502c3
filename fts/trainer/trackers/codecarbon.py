"""The energy of a run, measured by CodeCarbon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from fts.trainer.trackers.tracker import RunInfo, TrackerRun


@attrs.frozen
class CodeCarbon:
    """A tracker that measures the energy of a run; it logs no metrics.

    Attributes:
        meter: a `codecarbon.EmissionsTracker`.
    """

    meter: Any

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Does nothing: CodeCarbon stores its own configuration."""

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Does nothing: CodeCarbon writes its own measurements."""


def codecarbon(info: RunInfo) -> TrackerRun:
    """Writes `emissions.csv` in `output_dir` at the end; the environment variables `CODECARBON_*` apply."""
    from codecarbon import EmissionsTracker

    folder = Path(str(info.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    meter = EmissionsTracker(project_name=info.name or info.project, output_dir=str(folder))
    meter.start()
    return TrackerRun(CodeCarbon(meter), finish=meter.stop)
