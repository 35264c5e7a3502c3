"""Whether the current code is traced: by a graph, a `torch.func` transformation, or autograd."""

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


def any_requires_grad(*trees: Mapping[str, Tensor]) -> bool:
    """Whether autograd is recording any of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tree in trees for tensor in tree.values())


def is_compiling() -> bool:
    """Whether torch.compile or torch.export is tracing."""
    return torch.compiler.is_compiling()


def is_tracing() -> bool:
    """Whether a graph or a `torch.func` transformation is tracing, so that nothing may be seeded or written in place."""
    return is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
