"""Updates: from gradients to the next state."""

from __future__ import annotations

import optree
import torch
from torch import Tensor

from fts import transforms as tx
from fts.dtensors import any_dtensor, redistribute_like
from fts.errors import LossError, UnknownParameterError
from fts.state import TrainState, mark_donated
from fts.steps.tracing import any_requires_grad, device_of, is_tracing
from fts.typing import Info, Metrics, Params, Transform


def apply_gradients(
    state: TrainState, grads: Params, transform: Transform, *, buffers: Params | None = None, donate: bool = False
) -> tuple[TrainState, Info]:
    """Transform gradients to updates, and add these to the parameters.

    Args:
        state: with the parameters and the transform's state.
        grads: by parameter name, with the parameters' shapes and dtypes.
        transform: that the state was created with.
        buffers: the new buffers; None keeps the state's.
        donate: reuse the storage of `state` and `grads`, and mark `state` as consumed.

    Returns:
        The state one step later, and the transform's info.

    Raises:
        UnknownParameterError: the gradients' names are not those of the parameters.

    >>> state = TrainState.create({"w": torch.tensor([1.0])}, tx.sgd(0.5))
    >>> state, info = apply_gradients(state, {"w": torch.tensor([1.0])}, tx.sgd(0.5))
    >>> state.params["w"], int(state.step)
    (tensor([0.5000]), 1)
    """
    if grads.keys() != state.params.keys():
        raise UnknownParameterError(
            f"apply_gradients needs one gradient for each parameter: missing {sorted(state.params.keys() - grads.keys())[:5]}, "
            f"unexpected {sorted(grads.keys() - state.params.keys())[:5]}."
        )
    fast = transform.apply is not None and not is_tracing() and not any_requires_grad(state.params, grads)
    if fast and not donate:
        grads = _clones(grads)
    buffers = state.buffers if buffers is None else buffers
    return update_state(state, grads, transform, buffers, donate=donate, step_name="apply_gradients")


def update_state(
    state: TrainState, grads: Params, transform: Transform, buffers: Params, *, donate: bool, step_name: str
) -> tuple[TrainState, Info]:
    """As `apply_gradients`, but it may overwrite the storage of the gradients."""
    params, opt_state = state.params, state.opt_state
    # transforms rely on it: a gradient has the placements of its parameter
    grads = redistribute_like(grads, params) if any_dtensor(params.values()) else grads
    overwritten = False
    try:
        if transform.apply is None or is_tracing() or any_requires_grad(params, grads):
            updates, opt_state, info = transform.update(grads, opt_state, params)
            params = tx.apply_updates(params, updates)
            step = state.step + 1
            buffers = _buffers_after(state.buffers, buffers, info)
        else:
            with torch.no_grad():
                if not donate:
                    # the fast path on copies, so that steps with and without donation give the same bits
                    params, opt_state = _clones(params), optree.tree_map(Tensor.clone, opt_state)
                overwritten = donate
                params, opt_state, info = transform.apply(grads, opt_state, params)
                buffers = _buffers_after(state.buffers, buffers, info)
                if donate:
                    buffers = {name: _copy_into_old(buffers[name], old) for name, old in state.buffers.items()}
                step = state.step.add_(1) if donate else state.step + 1
        after = state.replace(params=params, opt_state=opt_state, step=step, buffers=buffers)
        check_info(transform, params, info)
    except BaseException:
        if overwritten:
            mark_donated(state, f"{step_name}, which failed in the middle of an update")
        raise
    if donate:
        mark_donated(state, step_name)
    return after, info


def _buffers_after(old: Params, new: Params, info: Info) -> Params:
    """The new buffers, or the old ones if the update was skipped, so that no NaN remains in the running statistics."""
    skipped = info.get("skipped")
    if skipped is None:
        return new
    return {
        name: torch.where(skipped.to(tensor.device) > 0, old[name], tensor) if tensor.shape == old[name].shape else tensor
        for name, tensor in new.items()
    }


def _copy_into_old(new: Tensor, old: Tensor) -> Tensor:
    """The new values in the old storage, if they fit."""
    return old if new is old else old.copy_(new) if new.shape == old.shape and new.dtype == old.dtype else new


def check_info(transform: Transform, params: Params, info: Info) -> None:
    """Call the `check` of a transform with its info, on the CPU only: elsewhere reading it would synchronize."""
    if transform.check is not None and not is_tracing() and device_of(params).type == "cpu":
        transform.check(info)


def merge_metrics(loss: Tensor, metrics: Metrics, info: Info) -> Metrics:
    """The metrics of a step: its loss, the loss function's metrics, and the transform's info."""
    if metrics and (taken := metrics.keys() & info.keys()):
        raise LossError(f"The loss function and the transform both report {sorted(taken)}. Rename the loss function's.")
    return {"loss": loss, **metrics, **info}


def _clones(tensors: Params) -> Params:
    return {name: tensor.clone() for name, tensor in tensors.items()}
