"""Which checkpoints of a run are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path

import attrs

from fts.errors import ArgumentError
from fts.loops.checkpoint_list import checkpoints_in, leftovers_in
from fts.loops.checkpoint_status import is_model_only, looks_complete
from fts.storage.atomic import delete_atomically

logger = logging.getLogger(__name__)


@attrs.frozen
class CheckpointScore:
    """What decides whether a checkpoint is kept.

    Attributes:
        step: when it was saved.
        metric: of its evaluation; None or NaN where there is none.
        complete: whether it can be used. One that is corrupt never takes the place of another.
        resumable: whether a run can resume from it; not from a model alone.
    """

    step: int
    metric: float | None = None
    complete: bool = True
    resumable: bool = True


def select_to_keep(
    checkpoints: Iterable[CheckpointScore], limit: int | None, *, best: int | None = None, greater_is_better: bool | None = None
) -> set[int]:
    """Which checkpoints to keep: the newest, the best, and as many of the next newest as the limit allows.

    This is the meaning of `save_total_limit` in transformers: the best one counts towards the limit, and with a limit of 1 there
    may be two, the best and the newest. So there are never more than `max(limit, 2)`; but where later ones have the model alone,
    the newest that a run can resume from is kept, too, so that there may be one more.

    Args:
        checkpoints: those that exist, in any order.
        limit: how many to keep; None for all.
        best: the step of the best one, if it is known.
        greater_is_better: find the best one by the metrics instead: the greatest, or with False the least; of equals the first.

    Returns:
        The steps of those to keep; all are complete.

    Raises:
        ArgumentError: the limit is not positive, or both `best` and `greater_is_better` are given.

    >>> scores = [CheckpointScore(10, 0.1), CheckpointScore(20, 0.4), CheckpointScore(30, 0.3), CheckpointScore(40, 0.5)]
    >>> sorted(select_to_keep(scores, 2, greater_is_better=False))
    [10, 40]
    >>> sorted(select_to_keep([CheckpointScore(10), CheckpointScore(20), CheckpointScore(30, complete=False)], 1))
    [20]
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ArgumentError(f"The limit of checkpoints is {limit!r}: give a whole number of at least 1, or None for all.")
    if best is not None and greater_is_better is not None:
        raise ArgumentError(f"Give best={best}, or greater_is_better={greater_is_better} to find it by the metrics, not both.")
    complete = sorted((one for one in checkpoints if one.complete), key=lambda one: one.step)
    steps = [one.step for one in complete]
    if limit is None or not steps:
        return set(steps)
    if greater_is_better is not None:
        best = _best_step(complete, greater_is_better)
    resumable = max((one.step for one in complete if one.resumable), default=None)
    pinned = {step for step in (best, resumable, steps[-1]) if step in steps}
    others = [step for step in steps if step not in pinned]
    return pinned | set(others[len(others) - max(0, min(limit - len(pinned), len(others))) :])


def _best_step(checkpoints: list[CheckpointScore], greater_is_better: bool) -> int | None:
    scores = [(one.metric, one.step) for one in checkpoints if one.metric is not None and not math.isnan(one.metric)]
    sign = -1 if greater_is_better else 1
    return min(scores, key=lambda pair: (sign * pair[0], pair[1]))[1] if scores else None


def rotate_checkpoints(
    root: str | Path, limit: int | None, best: str | Path | int | None = None, *, latest: str | Path | None = None
) -> None:
    """Delete the outdated checkpoints of a directory, after a save.

    Corrupt ones are found by their manifests and the sizes of their files: no checksum is computed. They do not count towards the
    limit; they are deleted when they are older than all that are kept, except the best. A deletion that fails is a warning.

    Args:
        root: a directory with `checkpoint-<step>` directories.
        limit: how many to keep; None for all. The newest that a run can resume from is kept in any case.
        best: the path or the step of one to keep, if there is one.
        latest: the one that was just written, which is kept also where another run has left later steps.

    >>> import tempfile
    >>> from fts.loops import atomic_directory
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for step in (1, 2, 3):
    ...         path = atomic_directory(f"{root}/checkpoint-{step}", lambda hidden: None)
    ...     rotate_checkpoints(root, 2)
    ...     sorted(path.name for path in Path(root).iterdir())
    ['checkpoint-2', 'checkpoint-3']
    """
    if limit is None:
        return
    for _, path in leftovers_in(root, "deleting"):
        _delete(path)
    paths = checkpoints_in(root)
    best_step, latest_step = _step_of(paths, best), _step_of(paths, latest)
    scores = [
        CheckpointScore(step, complete=looks_complete(path), resumable=not is_model_only(path)) for step, path in paths.items()
    ]
    kept = select_to_keep(scores, limit, best=best_step)
    oldest = min(kept - {best_step}, default=math.inf)
    for one in scores:
        outdated = one.step not in kept if one.complete else one.step < oldest
        if outdated and one.step != latest_step:
            logger.info("Deleting %s: at most %s checkpoints are kept.", paths[one.step], limit)
            _delete(paths[one.step])


def _step_of(paths: dict[int, Path], checkpoint: str | Path | int | None) -> int | None:
    if checkpoint is None or isinstance(checkpoint, int):
        return checkpoint
    return next((step for step, path in paths.items() if _is_same(path, Path(checkpoint))), None)


def _is_same(path: Path, other: Path) -> bool:
    # the trainer state of a run that was moved has the old paths
    return path.resolve() == other.resolve() or (path.name == other.name and not other.exists())


def _delete(path: Path) -> None:
    try:
        delete_atomically(path)
    except OSError as error:
        logger.warning("%s is outdated, but could not be deleted: %s. Training continues; delete it by hand.", path, error)
