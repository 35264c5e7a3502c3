"""The state in a checkpoint, also in that of a run which did otherwise with gradients that are not finite."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from fts import loops
from fts.distributed.process_group import ALONE, Group
from fts.errors import CheckpointError
from fts.loops import Position
from fts.loops.validation import is_whole
from fts.state import TrainState
from fts.transforms.loss_scaling import LossScaleState
from fts.transforms.wrapping import SkipState

AROUND = (SkipState, LossScaleState)
"""The states of what may be around the optimizer of a run."""

logger = logging.getLogger(__name__)


def load_state(checkpoint: str | Path, like: TrainState, group: Group = ALONE) -> tuple[TrainState, Position]:
    """Read a checkpoint as `loops.load_checkpoint` does, also where it withheld updates in another way than this run.

    So a run may go on with another `nonfinite`, or begin or cease to compute in float16: counts of skipped updates and a loss
    scale that the checkpoint has not begin anew, and those that this run has no use for are left out.

    Args:
        checkpoint: its directory.
        like: a state of the same model, with or without a `SkipState` or `LossScaleState` around that of the optimizer.
        group: see `load_checkpoint`.

    Raises:
        CheckpointError: as `load_checkpoint` says it.
    """
    try:
        return loops.load_checkpoint(checkpoint, like=like, group=group)
    except CheckpointError:
        found = _otherwise_withheld(checkpoint, like, group) if is_whole(checkpoint) else None
        if found is None:
            raise
        return found


def _otherwise_withheld(checkpoint: str | Path, like: TrainState, group: Group) -> tuple[TrainState, Position] | None:
    own, count = like.opt_state, torch.zeros((), dtype=torch.int64)
    inner = own.inner if isinstance(own, AROUND) else own
    scale = torch.ones((), dtype=torch.float32)
    for form in (inner, SkipState(inner, count, count), LossScaleState(inner, scale, count, count, count)):
        if type(form) is type(own):
            continue  # which was tried
        try:
            state, position = loops.load_checkpoint(checkpoint, like=like.replace(opt_state=form), group=group)
        except CheckpointError:
            continue
        found = state.opt_state
        before = f"{int(found.total)} skipped updates" if isinstance(found, AROUND) else "no skipped updates"
        now = "their count begins at 0" if isinstance(own, AROUND) else "this run skips none"
        logger.info("%s counts %s: %s.", checkpoint, before, now)
        if isinstance(own, LossScaleState):
            logger.info("The loss scale begins at %g, since %s has none.", float(own.scale), checkpoint)
        found = found.inner if isinstance(found, AROUND) else found
        return state.replace(opt_state=own._replace(inner=found) if isinstance(own, AROUND) else found), position
    return None
