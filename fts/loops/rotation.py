"""Which checkpoints of a run stay."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from fts.loops.finding import checkpoints_in

logger = logging.getLogger(__name__)


def outdated(checkpoint_steps: Sequence[int], limit: int | None, best: int | None) -> list[int]:
    """Which checkpoints to delete, so that at most `limit` stay: the oldest ones, but never the newest nor the best.

    Args:
        checkpoint_steps: the steps of those that are there.
        limit: how many may stay; None for all.
        best: the step of the best one, if there is one.

    Returns:
        The steps to delete, in order.

    >>> outdated([10, 20, 30, 40], 2, best=10)
    [20, 30]
    >>> outdated([10, 20], 1, best=10)
    []
    """
    ordered = sorted(checkpoint_steps)
    if limit is None:
        return []
    pinned = {best, *ordered[-1:]}
    loose = [step for step in ordered if step not in pinned]
    return loose[: max(0, min(len(loose), len(ordered) - limit))]


def rotate_checkpoints(root: str | Path, limit: int | None, best: str | Path | None = None) -> None:
    """Delete the outdated checkpoints of a directory.

    Args:
        root: a directory with `checkpoint-<step>` directories.
        limit: how many may stay; None for all.
        best: the path of the one that must stay, if there is one.
    """
    there = checkpoints_in(root)
    best_step = next((step for step, path in there.items() if best is not None and path.resolve() == Path(best).resolve()), None)
    for step in outdated(list(there), limit, best_step):
        logger.info("Deleting %s: at most %s checkpoints are kept.", there[step], limit)
        shutil.rmtree(there[step])
