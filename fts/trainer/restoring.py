"""The state in a checkpoint, also in that of a run which did otherwise with gradients that are not finite."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from fts import loops
from fts.errors import CheckpointError
from fts.loops import Position
from fts.loops.judging import is_whole
from fts.state import TrainState
from fts.transforms.wrapping import SkipState

logger = logging.getLogger(__name__)


def load_state(checkpoint: str | Path, like: TrainState) -> tuple[TrainState, Position]:
    """Read a checkpoint as `loops.load_checkpoint` does; where only the counts of `tx.skip_nonfinite` differ, without them.

    So a run may go on with another `nonfinite` than it began with: counts that the checkpoint has not begin at 0, and those that
    this run has no use for are left out.

    Args:
        checkpoint: its directory.
        like: a state of the same model, with or without a `SkipState` around that of the optimizer.

    Raises:
        CheckpointError: as `load_checkpoint` says it.
    """
    try:
        return loops.load_checkpoint(checkpoint, like=like)
    except CheckpointError:
        if not is_whole(checkpoint):
            raise
        try:
            found = _with_counts(checkpoint, like) if isinstance(like.opt_state, SkipState) else _without(checkpoint, like)
        except CheckpointError:
            found = None
        if found is None:
            raise
        return found


def _with_counts(checkpoint: str | Path, like: TrainState) -> tuple[TrainState, Position]:
    fresh = like.opt_state
    state, position = loops.load_checkpoint(checkpoint, like=like.replace(opt_state=fresh.inner))
    logger.info("%s counts no skipped updates: their count begins at 0.", checkpoint)
    return state.replace(opt_state=fresh._replace(inner=state.opt_state)), position


def _without(checkpoint: str | Path, like: TrainState) -> tuple[TrainState, Position]:
    count = torch.zeros((), dtype=torch.int64)
    state, position = loops.load_checkpoint(checkpoint, like=like.replace(opt_state=SkipState(like.opt_state, count, count)))
    logger.info("%s counts %s skipped updates: this run skips none.", checkpoint, int(state.opt_state.total))
    return state.replace(opt_state=state.opt_state.inner), position
