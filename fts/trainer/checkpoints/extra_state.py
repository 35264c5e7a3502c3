"""Resuming with other arguments: where in the data to go on, and what to tell about the changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fts import loops
from fts.loops.checkpoints import PROGRESS_NAME
from fts.storage import check_type, structure
from fts.trainer.reporting.running_metrics import RunningMetrics


def load_running_metrics(checkpoint: Path) -> RunningMetrics:
    """The figures that a checkpoint's run had read, but not logged.

    Raises:
        CheckpointError: they are damaged, or this version does not know them.
    """
    return structure(RunningMetrics, loops.load_extra(checkpoint).get("tally", {}), f'"tally" in {checkpoint / PROGRESS_NAME}')


def load_group_changes(checkpoint: Path) -> dict[str, Any]:
    """What callbacks of a checkpoint's run had written into the optimizer's groups.

    Raises:
        CheckpointError: it is damaged.
    """
    hint, where = dict[str, dict[str, Any]], f'"written" in {checkpoint / PROGRESS_NAME}'
    found: dict[str, Any] = check_type(loops.load_extra(checkpoint).get("written", {}), hint, where)
    check_type(found.get("settings", {}), dict[str, float], where)
    check_type(found.get("next", {}), dict[str, dict[str, float | bool | list[float] | None]], where)
    return found
