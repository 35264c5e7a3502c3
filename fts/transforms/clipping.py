"""Bounds on gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fts.dtensors import local_tensors, reduce_partial
from fts.transforms._checks import check_number, need_params
from fts.transforms._fast_paths import scale_in_place
from fts.transforms._norms import norm_now, norm_of, norms_of
from fts.transforms._scalars import times
from fts.typing import Info, OptState, Params, Transform

_EPSILON = 1e-6  # that of torch.nn.utils.clip_grad_norm_


def global_norm(tree: Any) -> Tensor:
    """The Euclidean norm of all numbers in a tree of tensors.

    Args:
        tree: a tensor, or dictionaries, lists and tuples of tensors, of any shapes and floating dtypes.

    Returns:
        0-d tensor of the widest dtype of the tensors (at least float32), on the device of the first; 0 for an empty tree. It
        is that of the full tensors also where they are sharded; then all ranks must call it.

    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return norm_of(_leaves(tree))


def clip_by_value(limit: float) -> Transform:
    """Clamp every number of the gradients to `[-limit, limit]`.

    Args:
        limit: a positive number.

    Returns:
        A transform without state.

    Raises:
        ArgumentError: `limit` is not positive and finite.

    >>> updates, _, _ = clip_by_value(1.0).update({"w": torch.tensor([0.5, -3.0])}, (), None)
    >>> updates["w"]
    tensor([ 0.5000, -1.0000])
    """
    check_number("clip_by_value: limit", limit, open_low=True)

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        return {name: g.clamp(-limit, limit) for name, g in grads.items()}, state, {}

    def update_(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        tensors = local_tensors(grads.values())
        torch._foreach_clamp_min_(tensors, -limit)
        torch._foreach_clamp_max_(tensors, limit)
        return grads, state, {}

    return Transform(lambda params: (), update, update_=update_, label=f"clip_by_value({limit})")


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale all gradients down together where their global norm exceeds `max_norm`.

    The factor is `min(1, max_norm / (norm + 1e-6))`, as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        max_norm: a positive number; `math.inf` changes nothing and only reports.

    Returns:
        A transform without state. It reports `grad_norm`, the norm before clipping.

    Raises:
        ArgumentError: `max_norm` is not positive.

    >>> updates, _, info = clip_by_global_norm(1.0).update({"w": torch.tensor([3.0, 4.0])}, (), None)
    >>> updates["w"], info["grad_norm"]
    (tensor([0.6000, 0.8000]), tensor(5.))

    Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks".
    """
    if max_norm != math.inf:
        check_number("clip_by_global_norm: max_norm", max_norm, open_low=True)

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        norm = global_norm(grads)
        if max_norm == math.inf:
            return grads, state, {"grad_norm": norm}
        factor = (max_norm / (norm + _EPSILON)).clamp(max=1.0)
        return {name: times(g, factor) for name, g in grads.items()}, state, {"grad_norm": norm}

    def update_(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        tensors = list(grads.values())
        norm = norm_now(tensors)
        if max_norm == math.inf:
            return grads, state, {"grad_norm": norm}
        if not norm.is_cpu:
            scale_in_place(tensors, (max_norm / (norm + _EPSILON)).clamp(max=1.0))
            return grads, state, {"grad_norm": norm}
        factor = max_norm / (float(norm) + _EPSILON)
        if not factor >= 1.0:  # also for NaN, which clipping passes on
            scale_in_place(tensors, factor)
        return grads, state, {"grad_norm": norm}

    return Transform(lambda params: (), update, update_=update_, label=f"clip_by_global_norm({max_norm})")


def clip_by_block_rms(threshold: float) -> Transform:
    """Scale each tensor down where its root mean square exceeds `threshold`.

    Args:
        threshold: a positive number.

    Returns:
        A transform without state.

    Raises:
        ArgumentError: `threshold` is not positive and finite.

    >>> updates, _, _ = clip_by_block_rms(1.0).update({"w": torch.tensor([2.0, 2.0]), "b": torch.tensor([0.5])}, (), None)
    >>> updates
    {'w': tensor([1., 1.]), 'b': tensor([0.5000])}

    Source: Shazeer, Stern 2018, "Adafactor", section 6.
    """
    check_number("clip_by_block_rms: threshold", threshold, open_low=True)

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        sizes = dict(zip(grads, norms_of(list(grads.values())), strict=True))
        return {name: g / (_rms(g, sizes[name]) / threshold).clamp(min=1.0) for name, g in grads.items()}, state, {}

    return Transform(lambda params: (), update, label=f"clip_by_block_rms({threshold})")


def adaptive_clip(clipping: float, eps: float = 1e-3) -> Transform:
    """Scale each unit's gradient down where its norm exceeds `clipping` times the norm of the unit's weights.

    A unit is one index of the first axis (an output of a linear or convolution layer); a tensor with fewer than two
    axes is one unit.

    Args:
        clipping: the largest ratio of the norms, a positive number.
        eps: the least weight norm that is used, so that zero weights can move.

    Returns:
        A transform without state; its `update` needs the parameters.

    Raises:
        ArgumentError: `clipping` or `eps` is not positive and finite, or `update` gets no parameters.

    >>> params, grads = {"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([[6.0, 8.0]])}
    >>> adaptive_clip(0.1).update(grads, (), params)[0]
    {'w': tensor([[0.3000, 0.4000]])}

    Source: Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without Normalization", eq. 3.
    """
    check_number("adaptive_clip: clipping", clipping, open_low=True)
    check_number("adaptive_clip: eps", eps, open_low=True)

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        weights = need_params(params, "adaptive_clip")
        sizes, norms = _unit_norms({name: weights[name] for name in grads}), _unit_norms(grads)
        return {name: _clip_units(g, norms[name], clipping * sizes[name].clamp(min=eps)) for name, g in grads.items()}, state, {}

    return Transform(lambda params: (), update, label=f"adaptive_clip({clipping})")


def _clip_units(grad: Tensor, norm: Tensor, limit: Tensor) -> Tensor:
    return torch.where(norm > limit, grad * (limit / norm.clamp(min=1e-6)), grad)


def _unit_norms(tensors: Params) -> Params:
    """The norm of each unit, in a shape that goes with the tensor."""
    single = {name: tensor for name, tensor in tensors.items() if tensor.ndim < 2}
    norms = {name: norm.to(single[name].dtype) for name, norm in zip(single, norms_of(list(single.values())), strict=True)}
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            # units are on one rank where rows are sharded; else this adds up their parts
            norms[name] = reduce_partial(torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True))
    return norms


def _rms(tensor: Tensor, norm: Tensor) -> Tensor:
    return norm.to(tensor.dtype) / math.sqrt(max(tensor.numel(), 1))


def _leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for child in children for leaf in _leaves(child)]
