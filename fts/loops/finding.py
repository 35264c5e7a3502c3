"""The checkpoints of a directory, and which of them are whole."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs

from fts.errors import CheckpointError
from fts.loops.checkpoints import PROGRESS, verify_checkpoint
from fts.loops.manifest import FORMAT, MANIFEST, verify_files
from fts.loops.whole import undo_interrupted
from fts.state import STATE

logger = logging.getLogger(__name__)

TOLD = "trainer_state.json"
"""Where a run of the Trainer keeps its figures, and which step was the best."""

Condition: TypeAlias = Literal["whole", "model only", "damaged", "unknown", "cut off"]
"""What a checkpoint is good for.

    whole       a run can go on from it
    model only  it is intact, but has no state of an optimizer: a run cannot go on from it (`save_only_model`)
    damaged     files are missing, truncated or changed
    unknown     it cannot be judged: another program wrote it, or a later version of fts, or it may not be read
    cut off     what a run left that died while it wrote or deleted a checkpoint; its name is hidden
"""


@attrs.frozen
class Found:
    """A checkpoint as `survey` finds it.

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


def checkpoints_in(root: str | Path) -> dict[int, Path]:
    """The checkpoints of a directory by step, in order; whole or not."""
    return _named(root, r"checkpoint-(\d+)")


def leftovers_in(root: str | Path, kind: Literal["writing", "deleting"]) -> dict[int, Path]:
    """What runs left that died while they wrote or deleted a checkpoint, by step."""
    return _named(root, rf"\.checkpoint-(\d+)\.{kind}")


def _named(root: str | Path, pattern: str) -> dict[int, Path]:
    root = Path(root)
    if not root.is_dir():
        return {}
    names = ((re.fullmatch(pattern, path.name), path) for path in root.iterdir())
    return dict(sorted((int(name[1]), path) for name, path in names if name and path.is_dir()))


def survey(root: str | Path, progress: Callable[[int, int], None] | None = None) -> list[Found]:
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
    ...     [(found.step, found.condition) for found in survey(root)]
    [(7, 'damaged')]
    """
    _undo_interrupted_in(Path(root))
    there = checkpoints_in(root)
    found = []
    for number, (step, path) in enumerate(there.items()):
        if progress is not None:
            progress(number, len(there))
        found.append(examine(path, step))
    for kind, doing in (("writing", "save"), ("deleting", "deletion")):
        for step, path in leftovers_in(root, kind).items():  # type: ignore[arg-type]  # a tuple's strings are not literals
            problem = f"{path} is what is left of a {doing} that was cut off."
            found.append(Found(step, path, "cut off", problem, _size(path), _time(path)))
    return sorted(found, key=lambda one: one.step)


def examine(path: Path, step: int) -> Found:
    """Verify one checkpoint.

    Args:
        path: its directory.
        step: that of its name.
    """
    condition, problem = _judge(path)
    told = _told(path)
    metrics, best = _figures_at(told, step), _best_step(told)
    return Found(step, path, condition, problem, _size(path), _time(path), metrics, best)


def newest_checkpoint(root: str | Path, *, also: Callable[[Path], bool] | None = None) -> Path | None:
    """The checkpoint of the highest step that is whole; a warning says of each newer one why it is passed over.

    Args:
        root: a directory with `checkpoint-<step>` directories; it need not exist.
        also: whether one that cannot be judged, such as that of another program, is good enough all the same.

    Returns:
        Its path; None if there is none. Damaged and incomplete ones are passed over.
    """
    _undo_interrupted_in(Path(root))
    for path in leftovers_in(root, "writing").values():
        logger.warning("%s is what is left of a save that was cut off; `fts checkpoints prune` deletes it.", path)
    for path in reversed(checkpoints_in(root).values()):
        condition, problem = _judge(path)
        if condition == "whole" or (condition == "unknown" and also is not None and also(path)):
            return path
        logger.warning("%s is passed over (%s): %s", path, condition, problem)
    return None


def is_whole(directory: str | Path) -> bool:
    """Whether `verify_checkpoint` finds nothing wrong."""
    try:
        verify_checkpoint(directory)
    except CheckpointError:
        return False
    return True


def looks_whole(directory: Path) -> bool:
    """Whether the files that the manifest lists are there in their sizes, or nothing can be said. It reads no tensors."""
    if _unknown(directory):
        return True
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
        return all((directory / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def best_of(found: list[Found]) -> int | None:
    """The step of the best checkpoint, as the newest that tells has it; None if none tells, or it is not there."""
    told = next((one.best for one in reversed(found) if one.best is not None), None)
    return told if any(one.step == told and one.condition != "cut off" for one in found) else None


def _judge(path: Path) -> tuple[Condition, str | None]:
    unknown = _unknown(path)
    if unknown is not None:
        return "unknown", unknown
    try:
        if (path / MANIFEST).is_file() and not (path / PROGRESS).exists() and not (path / STATE).exists():
            verify_files(path)
            return "model only", f"{path} has a model, but no state of a run (save_only_model): no run can go on from it."
        verify_checkpoint(path)
    except CheckpointError as error:
        return "unknown" if isinstance(error.__cause__, PermissionError) else "damaged", str(error)
    return "whole", None


def _unknown(path: Path) -> str | None:
    """Why a checkpoint cannot be judged, if it cannot."""
    try:
        return _foreign(path)
    except PermissionError as error:
        return f"{path} may not be read: {error}"


def _foreign(path: Path) -> str | None:
    """Which other program wrote a checkpoint, if one did."""
    try:
        document = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        if names and not names & {PROGRESS, STATE}:
            return f"{path} has no {MANIFEST} and no file that fts alone writes: another program wrote it."
        return None
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError):
        return None
    found = document.get("format") if isinstance(document, dict) else None
    if isinstance(found, int) and found > FORMAT:
        return f"{path} has format {found}: a later version of fts wrote it; this one reads format {FORMAT}."
    return None


def _undo_interrupted_in(root: Path) -> None:
    for entry in list(root.iterdir()) if root.is_dir() else []:
        aside = re.fullmatch(r"\.(checkpoint-\d+)\.replaced", entry.name)
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


def _told(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / TOLD).read_text())
    except (OSError, ValueError, RecursionError):  # figures for a list, which nothing else hangs on
        return {}
    return document if isinstance(document, dict) else {}


def _figures_at(told: Mapping[str, Any], step: int) -> dict[str, float]:
    history = told.get("log_history")
    entries = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    figures = [pair for entry in entries if entry.get("step") == step for pair in entry.items()]
    return {name: float(value) for name, value in figures if _is_figure(name, value)}


def _is_figure(name: str, value: Any) -> bool:
    """Whether it is a number of an evaluation, and none of its speed."""
    number = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
    return number and name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))


def _best_step(told: Mapping[str, Any]) -> int | None:
    step, path = told.get("best_global_step"), told.get("best_model_checkpoint")
    if isinstance(path, str) and (name := re.fullmatch(r"checkpoint-(\d{1,18})", Path(path).name)):
        return int(name[1])
    return step if isinstance(step, int) and not isinstance(step, bool) and step > 0 else None
