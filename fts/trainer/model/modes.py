"""Train mode and evaluation mode of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fts.steps.module_binding import ModuleBinding


@contextmanager
def evaluation_mode(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """No gradients, and every module in eval mode, until the block ends; then its mode is restored.

    Args:
        model: its parameters and buffers stay the same objects with the same storage.
        dtype: floating-point parameters and buffers are replaced by copies of this type within the block.

    >>> net = nn.Linear(1, 1)
    >>> with evaluation_mode(net, torch.bfloat16):
    ...     net.weight.dtype, net.training
    (torch.bfloat16, False)
    >>> net.weight.dtype, net.training
    (torch.float32, True)
    """
    with torch.no_grad(), in_eval_mode(model):
        if dtype is None:
            yield
            return
        with ModuleBinding(model).reparametrize(_cast_tensors(model, dtype)):
            yield


def _cast_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    cast: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        data = data.to(dtype) if data.is_floating_point() else data
        cast[name] = nn.Parameter(data, requires_grad=parameter.requires_grad and data.is_floating_point())
    for name, buffer in model.named_buffers():
        cast[name] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return cast


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode until the block ends; then its mode is restored."""
    trained = [child for child in model.modules() if child.training]
    try:
        for child in trained:
            child.training = False
        yield
    finally:
        for child in trained:
            child.training = True


@contextmanager
def in_train_mode(model: nn.Module) -> Iterator[None]:
    """Every module in train mode until the block ends; then its mode is restored."""
    modes = [(child, child.training) for child in model.modules()]
    model.train()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
