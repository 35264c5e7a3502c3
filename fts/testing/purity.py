"""Laws of purity: the same inputs give the same outputs, and inputs are not changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fts.testing.comparison import (
    clone_tree,
    fail,
    law,
    named_tensors,
    require_equal,
    storage_ptrs,
    transform_summary,
    tree_tensors,
)
from fts.typing import Params, Transform


def same_inputs_same_outputs(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """`init` and `update` are functions of their arguments: no hidden state, no global random numbers.

    Args:
        transform: to check.
        params: the parameters, at which all updates are taken.
        gradients: of successive updates.

    Raises:
        LawError: a second call gave another result.
    """
    with law("same_inputs_same_outputs", transform_summary(transform)):
        state = transform.init(params)
        torch.rand(1)  # other random numbers must not matter
        require_equal("init(params)", transform.init(params), state)
        for grads in gradients:
            first = transform.update(grads, state, params)
            torch.rand(1)
            second = transform.update(grads, state, params)
            for what, one, two in zip(("updates", "state", "info"), first, second, strict=True):
                require_equal(what, two, one)
            state = first[1]


def inputs_unchanged(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """`init` and `update` do not write their arguments.

    Args:
        transform: to check.
        params: the parameters, at which all updates are taken.
        gradients: of successive updates.

    Raises:
        LawError: an argument was changed.
    """
    with law("inputs_unchanged", transform_summary(transform)):
        copy = clone_tree(params)
        state = transform.init(params)
        require_equal("after init, params", params, copy)
        for grads in gradients:
            inputs = {"grads": grads, "state": state, "params": params}
            copies = {name: clone_tree(tree) for name, tree in inputs.items()}
            _, after, _ = transform.update(dict(grads), state, dict(params))
            for name, tree in inputs.items():
                require_equal(f"after update, {name}", tree, copies[name])
            state = after


def state_owns_its_memory(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """A fresh state shares no memory with the parameters, nor do two of its tensors, so that steps may write in place.

    The same is true after the fast paths `apply` and `update_`.

    Args:
        transform: to check.
        params: the parameters.
        gradients: of successive updates.

    Raises:
        LawError: memory is shared.
    """
    with law("state_owns_its_memory", transform_summary(transform)):
        own_params = clone_tree(params)
        state = transform.init(own_params)
        _require_unshared("init(params)", state, own_params)
        if transform.apply is not None:
            for grads in gradients:
                own_grads = clone_tree(grads)
                own_params, state, _ = transform.apply(own_grads, state, own_params)
                _require_unshared("apply's state", state, own_params, own_grads)
        if transform.update_ is not None:
            state = transform.init(own_params)
            for grads in gradients:
                own_grads = clone_tree(grads)
                updates, state, _ = transform.update_(own_grads, state, own_params)
                # the next step may overwrite the updates and the gradients, but not the parameters or the state
                _require_unshared("update_'s state", state, own_params, own_grads, updates)
                shared = storage_ptrs(tree_tensors(updates)) & storage_ptrs(tree_tensors(own_params))
                if shared:
                    fail("update_'s updates share memory with the parameters; return copies")


def _require_unshared(what: str, state: object, *others: Params) -> None:
    owners: dict[int, str] = {}
    for other, kind in zip(others, ("the parameter", "the gradient", "the update"), strict=False):
        owners |= {tensor.untyped_storage().data_ptr(): f"{kind} {name!r}" for name, tensor in other.items() if tensor.numel()}
    for path, tensor in named_tensors(what, state).items():
        if not tensor.numel():
            continue
        owner = owners.setdefault(tensor.untyped_storage().data_ptr(), path)
        if owner != path:
            fail(f"{path} shares memory with {owner}; keep a copy (tensor.clone())")
