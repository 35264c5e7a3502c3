"""The checkpoints of a directory, and which of them are whole."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import attrs

from fts.loops.history import best_step, history_in, metrics_at
from fts.loops.validation import Condition, checkpoint_status
from fts.storage.atomic import undo_interrupted

logger = logging.getLogger(__name__)

Doing: TypeAlias = Literal["writing", "deleting"]

INTERRUPTED: dict[Doing, str] = {"writing": "save", "deleting": "deletion"}
"""What leaves something behind where a run dies in it, in words."""


@attrs.frozen
class CheckpointInfo:
    """A checkpoint as `list_checkpoints` finds it.

    Attributes:
        step: that of its name.
        path: its directory.
        condition: what it is good for.
        problem: what is wrong with it; None if it is whole.
        nbytes: the size of its files.
        written: when, in seconds since 1970; 0 if that cannot be read.
        metrics: the evaluation at its step, if its run tells.
        best: the step that was the best when it was written, if its run tells.
    """

    step: int
    path: Path
    condition: Condition
    problem: str | None = None
    nbytes: int = 0
    written: float = 0.0
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    best: int | None = None


STEP = r"(0|[1-9][0-9]*)"
"""A step in the name of a checkpoint, as it is written: a copy under `checkpoint-009` is none."""


def checkpoints_in(root: str | Path) -> dict[int, Path]:
    """The checkpoints of a directory by step, in order; whole or not."""
    return dict(_named(root, rf"checkpoint-{STEP}"))


def leftovers_in(root: str | Path, doing: Doing) -> list[tuple[int, Path]]:
    """What runs left that died while they wrote or deleted a checkpoint, with its step, in order."""
    return _named(root, rf"\.checkpoint-{STEP}(?:\.[0-9a-f]+)?\.{doing}")


def _named(root: str | Path, pattern: str) -> list[tuple[int, Path]]:
    root = Path(root)
    if not root.is_dir():
        return []
    names = ((re.fullmatch(pattern, path.name), path) for path in root.iterdir())
    return sorted((int(name[1]), path) for name, path in names if name and path.is_dir())


def list_checkpoints(root: str | Path, progress: Callable[[int, int], None] | None = None) -> list[CheckpointInfo]:
    """Every checkpoint of a directory, verified by its checksums, and what interrupted runs left.

    Args:
        root: a directory with `checkpoint-<step>` directories; it need not exist. Where a save died while it replaced a
            checkpoint, that is undone; nothing else is changed.
        progress: told how many were verified, and how many there are, before each.

    Returns:
        By step, the oldest first.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     Path(root, "checkpoint-7").mkdir()
    ...     [(found.step, found.condition) for found in list_checkpoints(root)]
    [(7, 'damaged')]
    """
    _undo_interrupted_in(Path(root))
    there = checkpoints_in(root)
    found = []
    for number, (step, path) in enumerate(there.items()):
        if progress is not None:
            progress(number, len(there))
        found.append(_examined(path, step))
    for doing, what in INTERRUPTED.items():
        for step, path in leftovers_in(root, doing):
            problem = f"{path} is what is left of a {what} that was cut off."
            found.append(CheckpointInfo(step, path, "cut off", problem, _size(path), _time(path)))
    return sorted(found, key=lambda one: one.step)


def _examined(path: Path, step: int) -> CheckpointInfo:
    condition, problem = checkpoint_status(path)
    history = history_in(path)
    return CheckpointInfo(step, path, condition, problem, _size(path), _time(path), metrics_at(history, step), best_step(history))


def newest_checkpoint(root: str | Path, *, also: Callable[[Path], bool] | None = None) -> Path | None:
    """The checkpoint of the highest step that is whole; a warning says of each newer one why it is passed over.

    Args:
        root: a directory with `checkpoint-<step>` directories; it need not exist.
        also: whether one that cannot be judged, such as that of another program, is good enough all the same.

    Returns:
        Its path; None if there is none. Damaged and incomplete ones are passed over.
    """
    _undo_interrupted_in(Path(root))
    for _, path in leftovers_in(root, "writing"):
        logger.warning("%s is what is left of a save that was cut off; `fts checkpoints prune` deletes it.", path)
    for path in reversed(checkpoints_in(root).values()):
        condition, problem = checkpoint_status(path)
        if condition == "whole" or (condition == "unknown" and also is not None and also(path)):
            return path
        logger.warning("%s is passed over (%s): %s", path, condition, problem)
    return None


def newest_of(found: list[CheckpointInfo]) -> int | None:
    """The step of the newest checkpoint that is whole."""
    return max((one.step for one in found if one.condition == "whole"), default=None)


def best_of(found: list[CheckpointInfo]) -> int | None:
    """The step of the best checkpoint, as the newest that tells has it; None if none tells, or it is not there."""
    told = next((one.best for one in reversed(found) if one.best is not None), None)
    return told if any(one.step == told and one.condition != "cut off" for one in found) else None


def _undo_interrupted_in(root: Path) -> None:
    for entry in list(root.iterdir()) if root.is_dir() else []:
        aside = re.fullmatch(rf"\.(checkpoint-{STEP})\.replaced", entry.name)
        if aside:
            try:
                undo_interrupted(root / aside[1])
            except OSError as error:
                logger.warning("%s is a whole checkpoint that was being replaced; it cannot be moved back: %s", entry, error)


def _size(path: Path) -> int:
    def sizes() -> Iterator[int]:
        for file in path.rglob("*"):
            try:
                yield file.stat().st_size if file.is_file() else 0
            except OSError:  # deleted meanwhile, or not to be read
                yield 0

    return sum(sizes())


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
