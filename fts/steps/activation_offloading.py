"""Activation offloading: activations stay in CPU memory between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from fts.dtensors import is_dtensor
from fts.steps.losses import ModuleLoss, call_loss, check_callable, function_name
from fts.typing import LossFn, LossOutput

MIN_NUMEL = 1024
"""Tensors with fewer elements stay on their device: moving one costs more than it saves."""


def offload_activations(loss: LossFn | ModuleLoss, *, min_numel: int = MIN_NUMEL) -> Any:
    """The same loss, with its activations in CPU memory between the forward and the backward pass.

    Parameters stay on their device. On CUDA the memory is pinned. `torch.func` and graphs do not support it: with
    engine="func" the module engine runs instead, and `steps.compile` falls back with a warning.

    Args:
        loss: `loss(params, batch)` or a `module_loss`.
        min_numel: the number of elements from which a tensor is moved.

    Returns:
        A loss of the same kind.

    >>> net = torch.nn.Linear(2, 1)
    >>> offload_activations(ModuleLoss(net, lambda model, batch: model(batch).sum())).label
    'module_loss(Linear, <lambda> with activations on the CPU)'
    """
    if isinstance(loss, ModuleLoss):
        run = attrs.evolve(loss)

        def offloaded_fn(model: Any, batch: Any, *args: Any) -> LossOutput:
            with save_on_cpu(min_numel):
                return call_loss(run, model, batch, *args)

        offloaded_fn.__name__ = f"{function_name(loss.fn) if loss.fn is not None else 'its own loss'} with activations on the CPU"
        return attrs.evolve(loss, fn=offloaded_fn)
    check_callable(loss, "offload_activations", "loss(params, batch)")

    def offloaded_loss(params: Any, batch: Any, *args: Any) -> Any:
        with save_on_cpu(min_numel):
            return loss(params, batch, *args)

    offloaded_loss.__name__ = f"{function_name(loss)} with activations on the CPU"
    return offloaded_loss


def save_on_cpu(min_numel: int = MIN_NUMEL) -> Any:
    """A context that keeps the tensors that a forward pass saves for the backward pass in CPU memory.

    Args:
        min_numel: the number of elements from which a tensor is moved.

    >>> with save_on_cpu():
    ...     loss = (torch.ones(2, requires_grad=True) ** 2).sum()
    >>> loss.backward()
    """
    return torch.autograd.graph.saved_tensors_hooks(_make_pack_hook(min_numel), _unpack)


def _make_pack_hook(min_numel: int) -> Callable[[Tensor], Any]:
    def pack(tensor: Tensor) -> Any:
        if tensor.numel() < min_numel or is_dtensor(tensor) or _is_parameter(tensor):
            return tensor
        copy = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
        # no synchronization: the same device reads the copy later in the same stream
        copy.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, copy

    return pack


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, copy = packed
    moved: Tensor = copy.to(device, non_blocking=copy.is_pinned())
    return moved


def _is_parameter(tensor: Tensor) -> bool:
    """Whether it is a trained leaf or a view of one, such as a transposed weight."""
    base = tensor if tensor._base is None else tensor._base
    return base.is_leaf and base.requires_grad
