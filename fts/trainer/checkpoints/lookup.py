"""Which checkpoint a run resumes from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from fts import loops
from fts.distributed.error_propagation import fail_together
from fts.distributed.process_group import Group, restart_count
from fts.errors import ArgumentError
from fts.state import OPTIMIZER_NAME, TRAINABLE_NAME, WEIGHTS_NAME
from fts.storage import has_tensors
from fts.storage.atomic import recover_interrupted
from fts.trainer.checkpoints.transformers_files import is_resumable, is_transformers_checkpoint

logger = logging.getLogger(__name__)


def find_checkpoint(resume: bool | str | Path | None, root: str | Path, *, group: Group | None = None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; the main process decides for all ranks.

    With None it is the newest complete one where torchrun has restarted the processes after a failure, else none.

    Args:
        resume: True for the newest complete one in `root`, a path, False for none, or None, the default. transformers' Trainer
            may have written it, too.
        root: the directory of the checkpoints.
        group: all ranks.

    Raises:
        ArgumentError: there is none.
    """
    if group is None or group.size == 1:
        return _resolve(resume, root)
    with fail_together(group):
        found = _resolve(resume, root) if group.is_main_process else None
    return cast("Path | None", group.broadcast_object(found))


def _resolve(resume: bool | str | Path | None, root: str | Path) -> Path | None:
    if resume is False:
        return None
    if resume is None:
        return _newest_after_restart(root) if restart_count() else None
    if resume is True:
        newest = loops.newest_checkpoint(root, accept=is_resumable)
        if newest is None:
            raise ArgumentError(
                f"No valid checkpoint found in output directory ({root}), but resume_from_checkpoint=True. Train without it "
                "first, or give the path of a checkpoint."
            )
        return newest
    path = Path(resume)
    recover_interrupted(path)
    if is_transformers_checkpoint(path):
        return path
    if not has_tensors(path, WEIGHTS_NAME) and not has_tensors(path, TRAINABLE_NAME):
        there = "the directory does not exist" if not path.is_dir() else f"it has no {WEIGHTS_NAME}"
        raise ArgumentError(
            f"Can't find a valid checkpoint at {path}: {there}. Use resume_from_checkpoint=True for the newest one."
        )
    if not has_tensors(path, OPTIMIZER_NAME):
        raise ArgumentError(
            f"{path} has a model, but no {OPTIMIZER_NAME}: it was saved with save_only_model=True, or not by fts, and a run "
            "cannot resume from it. Begin a new run with its model: from_pretrained(path)."
        )
    return path


def _newest_after_restart(root: str | Path) -> Path | None:
    newest = loops.newest_checkpoint(root, accept=is_resumable)
    start = f"begins anew: there is no complete checkpoint in {root}" if newest is None else f"resumes from {newest}"
    logger.warning(
        "torchrun has restarted the processes (restart %s), so the run %s. Set resume_from_checkpoint=False to begin anew.",
        *(restart_count(), start),
    )
    return newest
