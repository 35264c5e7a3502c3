"""What else a checkpoint has for a run that resumes: metrics that are not logged yet, and changed optimizer settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fts import loops
from fts.loops.checkpoints import PROGRESS_NAME
from fts.storage import check_type, structure
from fts.trainer.reporting import RunningMetrics


def load_running_metrics(checkpoint: Path) -> RunningMetrics:
    """The metrics that a checkpoint's run had read, but not logged.

    Raises:
        CheckpointError: they are corrupt, or this version does not know them.
    """
    return structure(RunningMetrics, loops.load_extra(checkpoint).get("tally", {}), f'"tally" in {checkpoint / PROGRESS_NAME}')


def load_group_changes(checkpoint: Path) -> dict[str, Any]:
    """What callbacks of a checkpoint's run had written into the optimizer's groups.

    Raises:
        CheckpointError: it is corrupt.
    """
    hint, where = dict[str, dict[str, Any]], f'"written" in {checkpoint / PROGRESS_NAME}'
    found: dict[str, Any] = check_type(loops.load_extra(checkpoint).get("written", {}), hint, where)
    check_type(found.get("settings", {}), dict[str, float], where)
    check_type(found.get("next", {}), dict[str, dict[str, float | bool | list[float] | None]], where)
    return found
