"""Loading of the train state, also from a run that handled non-finite gradients in another way."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from fts import loops, transforms as tx
from fts.distributed.process_group import SINGLE_PROCESS, Group
from fts.errors import CheckpointError
from fts.loops import Position
from fts.loops.checkpoint_status import is_complete
from fts.state import OPTIMIZER_NAME, TrainState
from fts.storage import has_tensors
from fts.trainer.model import apply_eval_params, load_weights
from fts.transforms.loss_scaling import LossScaleState
from fts.transforms.wrappers import SkipState
from fts.typing import Transform

WRAPPER_STATES = (SkipState, LossScaleState)
"""The states of transforms that may wrap the optimizer of a run."""

logger = logging.getLogger(__name__)


def load_train_state(checkpoint: str | Path, like: TrainState, group: Group = SINGLE_PROCESS) -> tuple[TrainState, Position]:
    """Read a checkpoint as `loops.load_checkpoint` does, also where its run skipped updates in another way than this run.

    So a run can resume with another `nonfinite`, or with or without float16: counts of skipped updates and a loss scale that
    the checkpoint lacks begin anew, and those that this run does not need are dropped.

    Args:
        checkpoint: its directory.
        like: a state of the same model, with or without a `SkipState` or `LossScaleState` around the state of the optimizer.
        group: see `load_checkpoint`.

    Raises:
        CheckpointError: as in `load_checkpoint`.
    """
    try:
        return loops.load_checkpoint(checkpoint, like=like, group=group)
    except CheckpointError:
        found = _load_with_other_wrapper(checkpoint, like, group) if is_complete(checkpoint) else None
        if found is None:
            raise
        return found


def load_best_model(
    model: nn.Module, checkpoint: str, like: TrainState, transform: Transform, group: Group = SINGLE_PROCESS
) -> None:
    """Load the weights of a checkpoint into the model: those that its optimizer evaluates with, where it trains others.

    Args:
        model: is written in place.
        checkpoint: its path.
        like: a state of the same run.
        transform: the optimizer.
        group: see `loops.load_checkpoint`.
    """
    model_only = not has_tensors(Path(checkpoint), OPTIMIZER_NAME)  # then its weights are those that were evaluated
    if model_only or tx.eval_params(transform, like.opt_state, like.params) is like.params:
        load_weights(model, checkpoint)
        return
    state, _ = load_train_state(checkpoint, like, group)
    apply_eval_params(model, state, transform, always=True)


def _load_with_other_wrapper(checkpoint: str | Path, like: TrainState, group: Group) -> tuple[TrainState, Position] | None:
    own, count = like.opt_state, torch.zeros((), dtype=torch.int64)
    inner = own.inner if isinstance(own, WRAPPER_STATES) else own
    scale = torch.ones((), dtype=torch.float32)
    for stored in (inner, SkipState(inner, count, count), LossScaleState(inner, scale, count, count, count)):
        if type(stored) is type(own):
            continue  # tried before
        try:
            state, position = loops.load_checkpoint(checkpoint, like=like.replace(opt_state=stored), group=group)
        except CheckpointError:
            continue
        found = state.opt_state
        before = f"{int(found.total)} skipped updates" if isinstance(found, WRAPPER_STATES) else "no skipped updates"
        now = "their count begins at 0" if isinstance(own, WRAPPER_STATES) else "this run skips none"
        logger.info("%s counts %s: %s.", checkpoint, before, now)
        if isinstance(own, LossScaleState):
            logger.info("The loss scale begins at %g, since %s has none.", float(own.scale), checkpoint)
        found = found.inner if isinstance(found, WRAPPER_STATES) else found
        return state.replace(opt_state=own._replace(inner=found) if isinstance(own, WRAPPER_STATES) else found), position
    return None
