"""Activations that wait for the backward pass in the memory of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from fts.dtensors import is_sharded
from fts.steps.losses import ModuleLoss, call_loss, check_callable, name_of
from fts.typing import LossFn, LossOutput

SMALL = 1024
"""Tensors with fewer numbers stay where they are: to move one costs more than it saves."""


def offload_activations(loss: LossFn | ModuleLoss, *, least: int = SMALL) -> Any:
    """The same loss, whose activations are kept in the memory of the CPU between the forward and the backward pass.

    Parameters stay on their device. On CUDA the memory is pinned. `torch.func` and graphs have no place for it: with
    engine="func" the module engine does the work, and `steps.compile` falls back with a warning.

    Args:
        loss: `loss(params, batch)` or a `module_loss`.
        least: how many numbers a tensor must have to be moved.

    Returns:
        A loss of the same kind.

    >>> net = torch.nn.Linear(2, 1)
    >>> offload_activations(ModuleLoss(net, lambda model, batch: model(batch).sum())).label
    'module_loss(Linear, <lambda> with activations on the CPU)'
    """
    if isinstance(loss, ModuleLoss):
        run = attrs.evolve(loss)

        def within(model: Any, batch: Any, *args: Any) -> LossOutput:
            with kept_on_cpu(least):
                return call_loss(run, model, batch, *args)

        within.__name__ = f"{name_of(loss.fn) if loss.fn is not None else 'its own loss'} with activations on the CPU"
        return attrs.evolve(loss, fn=within)
    check_callable(loss, "offload_activations", "loss(params, batch)")

    def of_params(params: Any, batch: Any, *args: Any) -> Any:
        with kept_on_cpu(least):
            return loss(params, batch, *args)

    of_params.__name__ = f"{name_of(loss)} with activations on the CPU"
    return of_params


def kept_on_cpu(least: int = SMALL) -> Any:
    """A context in which what a forward pass keeps for the backward pass is kept in the memory of the CPU.

    Args:
        least: how many numbers a tensor must have to be moved.

    >>> with kept_on_cpu():
    ...     loss = (torch.ones(2, requires_grad=True) ** 2).sum()
    >>> loss.backward()
    """
    return torch.autograd.graph.saved_tensors_hooks(_packer(least), _unpacked)


def _packer(least: int) -> Callable[[Tensor], Any]:
    def pack(tensor: Tensor) -> Any:
        if tensor.numel() < least or is_sharded(tensor) or _is_of_parameter(tensor):
            return tensor
        kept = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
        # nobody waits for the copy: what reads it on the same device comes later in the same stream
        kept.copy_(tensor, non_blocking=tensor.is_cuda)
        return tensor.device, kept

    return pack


def _unpacked(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, kept = packed
    moved: Tensor = kept.to(device, non_blocking=kept.is_pinned())
    return moved


def _is_of_parameter(tensor: Tensor) -> bool:
    """Whether it is a leaf that is trained, or a view of one, such as a transposed weight."""
    base = tensor if tensor._base is None else tensor._base
    return base.is_leaf and base.requires_grad
