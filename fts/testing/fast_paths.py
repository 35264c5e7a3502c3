"""Laws of fast paths: `apply` and `update_` compute what `update` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fts.testing.comparison import clone_tree, law, max_abs, require_close, require_equal, transform_summary
from fts.transforms import apply_updates
from fts.typing import Params, Transform


def apply_equals_update(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """`apply` gives the parameters, state and info of `update`, to rounding, also over several updates in place.

    Args:
        transform: to check; skipped if it has no `apply`.
        params: the parameters.
        gradients: of successive updates.

    Raises:
        LawError: the two differ.
    """
    if transform.apply is None:
        return
    with law("apply_equals_update", transform_summary(transform)):
        scale = max_abs(params, gradients)
        state = transform.init(params)
        fast_params = clone_tree(params)
        fast_state = transform.init(fast_params)
        for grads in gradients:
            updates, after, info = transform.update(grads, state, params)
            expected = apply_updates(params, updates)
            found = transform.apply(clone_tree(grads), clone_tree(state), clone_tree(params))
            for what, one, two in zip(("params", "state", "info"), found, (expected, after, info), strict=True):
                require_close(f"apply's {what}", one, two, scale=scale, inputs=grads)
            # the same in place, on its own results, with gradients that are overwritten afterwards
            own_grads = clone_tree(grads)
            fast_params, fast_state, _ = transform.apply(own_grads, fast_state, fast_params)
            _overwrite(own_grads)
            params, state = expected, after
        if all(tensor.dtype == torch.float64 for tensor in params.values()) and _well_scaled(params, gradients):
            # rounding errors add up over updates; only in float64 are they much smaller than a mistake
            require_close("after several updates in place, params", fast_params, params, scale=scale, tolerance_factor=1e4)
            require_close("after several updates in place, state", fast_state, state, scale=scale, tolerance_factor=1e4)


def update_in_place_equals_update(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """`update_` gives the updates, state and info of `update`, to rounding, and never writes the parameters.

    Args:
        transform: to check; skipped if it has no `update_`.
        params: the parameters, at which all updates are taken.
        gradients: of successive updates.

    Raises:
        LawError: the two differ, or the parameters were written.
    """
    if transform.update_ is None:
        return
    with law("update_in_place_equals_update", transform_summary(transform)):
        scale = max_abs(params, gradients)
        copy = clone_tree(params)
        state = transform.init(params)
        fast_state = transform.init(params)
        for grads in gradients:
            updates, after, info = transform.update(grads, state, params)
            found = transform.update_(clone_tree(grads), clone_tree(state), params)
            for what, one, two in zip(("updates", "state", "info"), found, (updates, after, info), strict=True):
                require_close(f"update_'s {what}", one, two, scale=scale, inputs=grads)
            own_grads = clone_tree(grads)
            fast_updates, fast_state, _ = transform.update_(own_grads, fast_state, params)
            _overwrite(own_grads)
            _overwrite(fast_updates)
            require_equal("after update_, params", params, copy)
            state = after
        if all(tensor.dtype == torch.float64 for tensor in params.values()) and _well_scaled(params, gradients):
            require_close("after several updates in place, state", fast_state, state, scale=scale, tolerance_factor=1e4)


def _overwrite(tree: Params) -> None:
    for tensor in tree.values():
        with torch.no_grad():
            tensor.fill_(float("nan"))


def _well_scaled(params: Params, gradients: Sequence[Params]) -> bool:
    """Whether all numbers have an ordinary size, so that small errors of parameters stay small in the next update."""

    def ordinary(tensor: Tensor) -> bool:
        sizes = tensor[tensor != 0].abs()
        return bool(((sizes > 1e-6) & (sizes < 1e6)).all())

    return all(ordinary(tensor) for tree in (params, *gradients) for tensor in tree.values())
