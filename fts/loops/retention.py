"""Which checkpoints of a run stay."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path

import attrs

from fts.errors import ArgumentError
from fts.loops.checkpoint_list import checkpoints_in, leftovers_in
from fts.loops.validation import has_model_alone, looks_whole
from fts.storage.atomic import delete

logger = logging.getLogger(__name__)


@attrs.frozen
class CheckpointScore:
    """What decides whether a checkpoint stays.

    Attributes:
        step: when it was saved.
        metric: the figure of its evaluation; None or NaN where there is none.
        whole: whether it can be used. One that is damaged stays in nobody's place.
        resumable: whether a run can go on from it; not from a model alone.
    """

    step: int
    metric: float | None = None
    whole: bool = True
    resumable: bool = True


def select_to_keep(
    checkpoints: Iterable[CheckpointScore], limit: int | None, *, best: int | None = None, greater_is_better: bool | None = None
) -> set[int]:
    """Which checkpoints stay: the newest, the best, and as many of the next newest as the limit leaves room for.

    It is the meaning that `save_total_limit` has in transformers: the best one takes one of the places, and with a limit of 1
    there may be two, the best and the newest. So there are never more than `max(limit, 2)`; but where later ones have the model
    alone, the newest that a run can go on from stays with them, so that there may be one more.

    Args:
        checkpoints: those that are there, in any order.
        limit: how many may stay; None for all.
        best: the step of the best one, if it is known.
        greater_is_better: find the best one by the metrics instead: the greatest, or with False the least; of equals the first.

    Returns:
        The steps of those that stay; all are whole.

    Raises:
        ArgumentError: the limit is not positive, or both `best` and `greater_is_better` are given.

    >>> scores = [CheckpointScore(10, 0.1), CheckpointScore(20, 0.4), CheckpointScore(30, 0.3), CheckpointScore(40, 0.5)]
    >>> sorted(select_to_keep(scores, 2, greater_is_better=False))
    [10, 40]
    >>> sorted(select_to_keep([CheckpointScore(10), CheckpointScore(20), CheckpointScore(30, whole=False)], 1))
    [20]
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ArgumentError(f"At most {limit!r} checkpoints cannot stay: give a whole number of at least 1, or None for all.")
    if best is not None and greater_is_better is not None:
        raise ArgumentError(f"Give best={best}, or greater_is_better={greater_is_better} to find it by the metrics, not both.")
    whole = sorted((one for one in checkpoints if one.whole), key=lambda one: one.step)
    steps = [one.step for one in whole]
    if limit is None or not steps:
        return set(steps)
    if greater_is_better is not None:
        best = _best_of(whole, greater_is_better)
    resumable = max((one.step for one in whole if one.resumable), default=None)
    pinned = {step for step in (best, resumable, steps[-1]) if step in steps}
    loose = [step for step in steps if step not in pinned]
    return pinned | set(loose[len(loose) - max(0, min(limit - len(pinned), len(loose))) :])


def _best_of(checkpoints: list[CheckpointScore], greater_is_better: bool) -> int | None:
    rated = [(one.metric, one.step) for one in checkpoints if one.metric is not None and not math.isnan(one.metric)]
    sign = -1 if greater_is_better else 1
    return min(rated, key=lambda pair: (sign * pair[0], pair[1]))[1] if rated else None


def rotate_checkpoints(
    root: str | Path, limit: int | None, best: str | Path | int | None = None, *, latest: str | Path | None = None
) -> None:
    """Delete the outdated checkpoints of a directory, after a save.

    Which of them are damaged is seen by their manifests and the sizes of their files: no checksum is computed. A damaged one
    takes no place; it goes when it is older than all that stay, but for the best. A deletion that fails is a warning.

    Args:
        root: a directory with `checkpoint-<step>` directories.
        limit: how many may stay; None for all. The newest that a run can go on from stays in any case.
        best: the path or the step of the one that must stay, if there is one.
        latest: the one that was just written, which stays also where another run has left later steps.

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
    there = checkpoints_in(root)
    best_step, latest_step = _step_of(there, best), _step_of(there, latest)
    rated = [CheckpointScore(step, whole=looks_whole(path), resumable=not has_model_alone(path)) for step, path in there.items()]
    stay = select_to_keep(rated, limit, best=best_step)
    oldest = min(stay - {best_step}, default=math.inf)
    for one in rated:
        outdated = one.step not in stay if one.whole else one.step < oldest
        if outdated and one.step != latest_step:
            logger.info("Deleting %s: at most %s checkpoints are kept.", there[one.step], limit)
            _delete(there[one.step])


def _step_of(there: dict[int, Path], checkpoint: str | Path | int | None) -> int | None:
    if checkpoint is None or isinstance(checkpoint, int):
        return checkpoint
    return next((step for step, path in there.items() if _is_same(path, Path(checkpoint))), None)


def _is_same(path: Path, other: Path) -> bool:
    # a run that was moved remembers where its checkpoints were
    return path.resolve() == other.resolve() or (path.name == other.name and not other.exists())


def _delete(path: Path) -> None:
    try:
        delete(path)
    except OSError as error:
        logger.warning("%s is outdated, but could not be deleted: %s. Training goes on; delete it by hand.", path, error)
