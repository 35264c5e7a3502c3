"""Fast paths that follow from what a transform offers, and what torch's fused kernels accept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain as concatenate
from operator import attrgetter
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fts.dtensors import local_storage_ptr, local_tensors, redistribute_like, to_local
from fts.typing import Info, Number, OptState, Params, Transform

Update: TypeAlias = Callable[[Params, OptState, Params | None], tuple[Params, OptState, Info]]
Apply: TypeAlias = Callable[[Params, OptState, Params], tuple[Params, OptState, Info]]

_FUSED_DEVICES = frozenset({"cpu", "cuda", "xpu", "mps"})
_dtype_of, _is_cpu, _is_contiguous = attrgetter("dtype"), attrgetter("is_cpu"), Tensor.is_contiguous
WIDE_DTYPES = frozenset({torch.float64, torch.float32})
_FUSED_DTYPES = WIDE_DTYPES | {torch.bfloat16, torch.float16}


def is_fast(*transforms: Transform) -> bool:
    """Whether any of them has a fast path."""
    return any(transform.apply is not None or transform.update_ is not None for transform in transforms)


def fast_update(transform: Transform) -> Update:
    """The transform's `update_`, or its `update` made safe for others that write in place after it."""
    return transform.update_ or _separated(transform.update)


def fast_apply(transform: Transform) -> Apply:
    """The transform's `apply`, or its updates added to the parameters in place."""
    return transform.apply or added(fast_update(transform))


def added(update: Update) -> Apply:
    """`apply` from an update whose results may be overwritten."""

    def apply(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info]:
        updates, state, info = update(grads, state, params)
        updates = redistribute_like(updates, params)
        torch._foreach_add_(local_tensors(params.values()), local_tensors(updates[name] for name in params))
        return params, state, info

    return apply


def pure_apply(transform: Transform) -> Apply:
    """`apply` by the pure update alone, for where no fast path may run."""
    return added(_separated(transform.update))


def _separated(update: Update) -> Update:
    """A pure update whose results may be overwritten one by one.

    A pure update may put a gradient or a parameter in its state (the last gradient, slow weights), return its state
    as updates (momentum), or the same tensor twice: right as long as nothing is written in place.
    """

    def separate(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        updates, state, info = update(grads, state, params)
        weights = {local_storage_ptr(tensor) for tensor in (params or {}).values()}
        given = weights | {local_storage_ptr(tensor) for tensor in grads.values()}
        state = pytree.tree_map(lambda leaf: leaf.clone() if local_storage_ptr(leaf) in given else leaf, state)
        taken = weights | {local_storage_ptr(leaf) for leaf in pytree.tree_leaves(state)}
        own: Params = {}
        for name, tensor in updates.items():
            own[name] = tensor.clone() if local_storage_ptr(tensor) in taken or 0 in to_local(tensor).stride() else tensor
            taken.add(local_storage_ptr(own[name]))
        return own, state, info

    return separate


def scale_in_place(tensors: Iterable[Tensor], factor: Any) -> None:
    """Multiply in place by a number or a 0-d tensor.

    Sharded tensors are multiplied by their local shards.
    """
    scale_(local_tensors(tensors), factor)


def scale_(tensors: list[Tensor], factor: Any) -> None:
    """Multiply plain tensors in place by a number or a 0-d tensor.

    The kernels are two to three times as fast with a 0-d tensor of the tensors' own dtype, on the CPU also for numbers.
    """
    own = wide_dtype(tensors)
    if isinstance(factor, Tensor):
        factor = factor if own is None else factor.to(own)
    elif tensors[0].is_cpu:
        factor = torch.full((), factor, dtype=own or torch.float64)
    torch._foreach_mul_(tensors, factor)


def wide_dtype(tensors: list[Tensor]) -> torch.dtype | None:
    """The dtype of all of them, where that is float32 or float64."""
    dtypes = set(map(_dtype_of, tensors))
    return next(iter(dtypes)) if len(dtypes) == 1 and dtypes <= WIDE_DTYPES else None


def for_kernel(rate: Number) -> Number:
    """A learning rate as the fused kernels take it: off the CPU they read a tensor as float32."""
    if isinstance(rate, Tensor):
        return rate.detach() if rate.is_cpu else rate.detach().float()
    return rate


def fused_lists(params: Params, grads: Params, *moments: Params, half_on_cpu: bool = True) -> list[list[Tensor]] | None:
    """Parameters, gradients and moments as lists for a fused kernel, or None where no fused kernel can take them.

    The kernels walk through memory and ignore strides, so a gradient that is laid out unlike its parameter is
    copied, and other differences in layout are left to kernels that respect them. With `half_on_cpu=False` so are
    bfloat16 and float16 on the CPU, where torch 2.13's `_fused_sgd_` silently does nothing. Of tensors that are sharded over
    ranks the lists hold the local shards.
    """
    weights, slopes = local_tensors(params.values()), local_tensors(grads[name] for name in params)
    rest = [local_tensors(tensors[name] for name in params) for tensors in moments]
    dtypes = set(map(_dtype_of, concatenate(weights, slopes)))
    if not dtypes <= (_FUSED_DTYPES if half_on_cpu or not weights[0].is_cpu else WIDE_DTYPES):
        return None
    if len(dtypes) > 1 and list(map(_dtype_of, weights)) != list(map(_dtype_of, slopes)):
        return None
    if not all(map(_is_cpu, weights)):
        devices = {tensor.device for tensor in weights}
        if len(devices) > 1 or len(dtypes) > 1 or devices.pop().type not in _FUSED_DEVICES:
            return None
    if not all(map(_is_contiguous, concatenate(weights, slopes, *rest))):
        for i, weight in enumerate(weights):
            layout = torch.empty_like(weight)
            if layout.stride() != weight.stride() or any(column[i].stride() != weight.stride() for column in rest):
                return None
            if slopes[i].stride() != weight.stride():
                slopes[i] = layout.copy_(slopes[i])
    return [weights, slopes, *rest]
