"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path

from fts import loops
from fts.errors import ArgumentError
from fts.state import OPTIMIZER, TRAINED, WEIGHTS
from fts.storage import has_tensors
from fts.storage.whole import undo_interrupted
from fts.trainer.foreign import can_be_resumed, is_transformers_checkpoint


def find_checkpoint(resume: bool | str | Path | None, root: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means.

    Args:
        resume: True for the newest whole one in `root`, a path, or None or False for none; transformers' Trainer may have
            written it, too.
        root: the directory of the checkpoints.

    Raises:
        ArgumentError: there is none.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        newest = loops.newest_checkpoint(root, also=can_be_resumed)
        if newest is None:
            raise ArgumentError(
                f"No valid checkpoint found in output directory ({root}), but resume_from_checkpoint=True. Train without it "
                "first, or give the path of a checkpoint."
            )
        return newest
    path = Path(resume)
    undo_interrupted(path)
    if is_transformers_checkpoint(path):
        return path
    if not has_tensors(path, WEIGHTS) and not has_tensors(path, TRAINED):
        there = "the directory does not exist" if not path.is_dir() else f"it has no {WEIGHTS}"
        raise ArgumentError(
            f"Can't find a valid checkpoint at {path}: {there}. Use resume_from_checkpoint=True for the newest one."
        )
    if not has_tensors(path, OPTIMIZER):
        raise ArgumentError(
            f"{path} has a model, but no {OPTIMIZER}: it was saved with save_only_model=True, or not by fts, and a run cannot go "
            "on from it. Begin a new run with its model: from_pretrained(path)."
        )
    return path
