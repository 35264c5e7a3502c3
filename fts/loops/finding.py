"""The checkpoints of a directory, and which of them are whole."""

from __future__ import annotations

import re
from pathlib import Path

from fts.errors import CheckpointError
from fts.loops.checkpoints import verify_checkpoint
from fts.loops.whole import undo_interrupted


def checkpoints_in(root: str | Path) -> dict[int, Path]:
    """The checkpoints of a directory by step, in order; whole or not."""
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(root).glob("checkpoint-*"))
    return dict(sorted((int(name[1]), path) for name, path in names if name))


def newest_checkpoint(root: str | Path) -> Path | None:
    """The checkpoint of the highest step that is whole.

    Args:
        root: a directory with `checkpoint-<step>` directories; it need not exist.

    Returns:
        Its path; None if there is none. Damaged and incomplete ones are passed over.
    """
    root = Path(root)
    if not root.is_dir():
        return None
    for entry in list(root.iterdir()):
        aside = re.fullmatch(r"\.(checkpoint-\d+)\.replaced", entry.name)
        if aside:
            undo_interrupted(root / aside[1])
    steps = checkpoints_in(root).items()
    return next((path for _, path in reversed(steps) if is_whole(path)), None)


def is_whole(directory: str | Path) -> bool:
    """Whether `verify_checkpoint` finds nothing wrong."""
    try:
        verify_checkpoint(directory)
    except CheckpointError:
        return False
    return True
