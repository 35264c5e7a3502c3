"""The trackers that accelerate does not know, with the methods of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from fts.trainer.trackers.names import as_they_are
from fts.trainer.trackers.tracker import Opening, Tracking


@attrs.frozen
class AzureML:
    """Figures of the Azure ML run that the script runs in.

    Attributes:
        run: an `azureml.core.Run`.
    """

    run: Any

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep the facts of a run as its properties, which are texts."""
        self.run.add_properties({name: str(value) for name, value in values.items()})

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Send figures."""
        for name, value in values.items():
            self.run.log(name, value, description=name, **({} if step is None else {"step": step}))


def azure_ml(opening: Opening) -> Tracking:
    """Opened by Azure ML, which also ends it."""
    from azureml.core.run import Run

    return Tracking(AzureML(Run.get_context()), rename=as_they_are)


@attrs.frozen
class CodeCarbon:
    """Measures the energy of a run; there are no figures to send.

    Attributes:
        meter: a `codecarbon.EmissionsTracker`.
    """

    meter: Any

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """It keeps its own facts."""

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """It keeps its own figures."""


def codecarbon(opening: Opening) -> Tracking:
    """Writes `emissions.csv` in `output_dir` at the end; `CODECARBON_*` in the environment count."""
    from codecarbon import EmissionsTracker

    folder = Path(str(opening.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    meter = EmissionsTracker(project_name=opening.name or opening.project, output_dir=str(folder))
    meter.start()
    return Tracking(CodeCarbon(meter), finish=meter.stop)


@attrs.frozen
class Neptune:
    """Figures of a Neptune run, under "finetuning".

    Attributes:
        run: a `neptune.Run`.
    """

    run: Any

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep the facts of a run."""
        for name, value in values.items():
            self.run[f"finetuning/parameters/{name}"] = value

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Send figures."""
        for name, value in values.items():
            self.run[f"finetuning/{name}"].append(value, step=step)


def neptune(opening: Opening) -> Tracking:
    """A Neptune run; `NEPTUNE_PROJECT`, `NEPTUNE_API_TOKEN` and `NEPTUNE_MODE` count."""
    import neptune

    project = os.environ.get("NEPTUNE_PROJECT")
    given = {"with_id": opening.run_id, "name": opening.name, "project": project}
    run = neptune.init_run(**{name: value for name, value in given.items() if value is not None})
    found = run["sys/id"].fetch() if os.environ.get("NEPTUNE_MODE", "async") in ("async", "sync") else None
    return Tracking(Neptune(run), found, finish=run.stop)
