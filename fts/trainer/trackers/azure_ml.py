"""Metrics of the Azure ML run that the script runs in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from fts.trainer.trackers.logs import keep_names
from fts.trainer.trackers.tracker import RunInfo, TrackerRun


@attrs.frozen
class AzureML:
    """A tracker for an Azure ML run.

    Attributes:
        run: an `azureml.core.Run`.
    """

    run: Any

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Store the configuration as the run's properties, which are strings."""
        self.run.add_properties({name: str(value) for name, value in values.items()})

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics."""
        for name, value in values.items():
            self.run.log(name, value, description=name, **({} if step is None else {"step": step}))


def azure_ml(info: RunInfo) -> TrackerRun:
    """Opened by Azure ML, which also ends it."""
    from azureml.core.run import Run

    return TrackerRun(AzureML(Run.get_context()), rewrite=keep_names)
