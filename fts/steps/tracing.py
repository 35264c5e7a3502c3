"""Where the code that asks is running: eagerly, in a graph, or inside a torch.func transformation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fts.errors import ArgumentError


def device_of(params: Mapping[str, Tensor]) -> torch.device:
    """The device of the first parameter."""
    for tensor in params.values():
        return tensor.device
    raise ArgumentError("The state has no parameters to train.")


def differentiated(*trees: Mapping[str, Tensor]) -> bool:
    """Whether someone outside takes a derivative with respect to any of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tree in trees for tensor in tree.values())


def in_graph() -> bool:
    """Whether this code is being traced by torch.compile or torch.export."""
    return torch.compiler.is_compiling()


def in_transform() -> bool:
    """Whether this code runs inside a graph or a `torch.func` transformation, where nothing may be seeded or written."""
    return in_graph() or torch._C._functorch.peek_interpreter_stack() is not None
