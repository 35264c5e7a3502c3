"""The checkpoints of a directory, and which of them are complete."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import attrs

from fts.loops.checkpoint_status import CheckpointStatus, checkpoint_status
from fts.loops.trainer_state import best_step, metrics_at, read_trainer_state
from fts.storage.atomic import recover_interrupted

logger = logging.getLogger(__name__)

Operation: TypeAlias = Literal["writing", "deleting"]

OPERATION_NAMES: dict[Operation, str] = {"writing": "save", "deleting": "deletion"}
"""Operations that leave a hidden directory where a run dies during them, in words."""


@attrs.frozen
class CheckpointInfo:
    """A checkpoint as `list_checkpoints` finds it.

    Attributes:
        step: the step in its name.
        path: its directory.
        status: see `CheckpointStatus`.
        problem: what is wrong with it; None if it is complete.
        nbytes: the size of its files.
        written: when, in seconds since 1970; 0 if that cannot be read.
        metrics: of the evaluation at its step, if there is a `trainer_state.json`.
        best: the step of the best evaluation when it was written, if there is a `trainer_state.json`.
    """

    step: int
    path: Path
    status: CheckpointStatus
    problem: str | None = None
    nbytes: int = 0
    written: float = 0.0
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    best: int | None = None


STEP = r"(0|[1-9][0-9]*)"
"""A step in the name of a checkpoint; a directory named `checkpoint-009` is not a checkpoint."""


def checkpoints_in(root: str | Path) -> dict[int, Path]:
    """The checkpoints of a directory by step, in order; complete or not."""
    return dict(_named(root, rf"checkpoint-{STEP}"))


def leftovers_in(root: str | Path, operation: Operation) -> list[tuple[int, Path]]:
    """The hidden directories of saves or deletions that were interrupted, with their steps, in order."""
    return _named(root, rf"\.checkpoint-{STEP}(?:\.[0-9a-f]+)?\.{operation}")


def _named(root: str | Path, pattern: str) -> list[tuple[int, Path]]:
    root = Path(root)
    if not root.is_dir():
        return []
    names = ((re.fullmatch(pattern, path.name), path) for path in root.iterdir())
    return sorted((int(name[1]), path) for name, path in names if name and path.is_dir())


def list_checkpoints(root: str | Path, progress: Callable[[int, int], None] | None = None) -> list[CheckpointInfo]:
    """Every checkpoint of a directory, verified by its checksums, and what interrupted saves and deletions left.

    Args:
        root: a directory with `checkpoint-<step>` directories; it need not exist. Where a save died while it replaced a
            checkpoint, that is undone; nothing else is changed.
        progress: called before each with the number of verified ones and the number of all.

    Returns:
        By step, the oldest first.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     Path(root, "checkpoint-7").mkdir()
    ...     [(one.step, one.status) for one in list_checkpoints(root)]
    [(7, 'corrupt')]
    """
    _recover_interrupted_in(Path(root))
    paths = checkpoints_in(root)
    found = []
    for number, (step, path) in enumerate(paths.items()):
        if progress is not None:
            progress(number, len(paths))
        found.append(_examine(path, step))
    for operation, name in OPERATION_NAMES.items():
        for step, path in leftovers_in(root, operation):
            problem = f"{path} was left by a {name} that was interrupted."
            found.append(CheckpointInfo(step, path, "interrupted", problem, _size(path), _time(path)))
    return sorted(found, key=lambda one: one.step)


def _examine(path: Path, step: int) -> CheckpointInfo:
    status, problem = checkpoint_status(path)
    trainer_state = read_trainer_state(path)
    return CheckpointInfo(
        step, path, status, problem, _size(path), _time(path), metrics_at(trainer_state, step), best_step(trainer_state)
    )


def newest_checkpoint(root: str | Path, *, accept: Callable[[Path], bool] | None = None) -> Path | None:
    """The complete checkpoint of the highest step; for each newer one, a warning says why it is skipped.

    Args:
        root: a directory with `checkpoint-<step>` directories; it need not exist.
        accept: whether to use one of unknown status, such as that of another program.

    Returns:
        Its path; None if there is none. Corrupt and incomplete ones are skipped.
    """
    _recover_interrupted_in(Path(root))
    for _, path in leftovers_in(root, "writing"):
        logger.warning("%s was left by a save that was interrupted; `fts checkpoints prune` deletes it.", path)
    for path in reversed(checkpoints_in(root).values()):
        status, problem = checkpoint_status(path)
        if status == "complete" or (status == "unknown" and accept is not None and accept(path)):
            return path
        logger.warning("%s is skipped (%s): %s", path, status, problem)
    return None


def newest_checkpoint_step(checkpoints: list[CheckpointInfo]) -> int | None:
    """The step of the newest complete checkpoint."""
    return max((one.step for one in checkpoints if one.status == "complete"), default=None)


def best_checkpoint_step(checkpoints: list[CheckpointInfo]) -> int | None:
    """The step of the best checkpoint by the newest `trainer_state.json`; None if none names it, or it does not exist."""
    best = next((one.best for one in reversed(checkpoints) if one.best is not None), None)
    return best if any(one.step == best and one.status != "interrupted" for one in checkpoints) else None


def _recover_interrupted_in(root: Path) -> None:
    for entry in list(root.iterdir()) if root.is_dir() else []:
        aside = re.fullmatch(rf"\.(checkpoint-{STEP})\.replaced", entry.name)
        if aside:
            try:
                recover_interrupted(root / aside[1])
            except OSError as error:
                logger.warning("%s is a complete checkpoint that was being replaced; it cannot be moved back: %s", entry, error)


def _size(path: Path) -> int:
    def sizes() -> Iterator[int]:
        for file in path.rglob("*"):
            try:
                yield file.stat().st_size if file.is_file() else 0
            except OSError:  # deleted meanwhile, or not readable
                yield 0

    return sum(sizes())


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
