"""Arithmetic on numbers that are Python numbers in an eager step and 0-d tensors inside a graph.

Schedules are written once with these functions. Tensors are taken to float64, so both forms agree to 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx


def widest(device: torch.device) -> torch.dtype:
    """The widest floating dtype that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def real(value: Any) -> Any:
    """`value` as a real number: a float, or a 0-d float64 tensor."""
    return value.to(widest(value.device)) if isinstance(value, Tensor) else float(value)


def at_most(value: Any, bound: float) -> Any:
    return value.clamp(max=bound) if isinstance(value, Tensor) else min(value, bound)


def at_least(value: Any, bound: float) -> Any:
    return value.clamp(min=bound) if isinstance(value, Tensor) else max(value, bound)


def cosine(value: Any) -> Any:
    return torch.cos(value) if isinstance(value, Tensor) else math.cos(value)


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`; both are evaluated."""
    if isinstance(condition, fx.Proxy):
        return recorded(choose, condition, yes, no)
    if not isinstance(condition, Tensor):
        return yes if condition else no
    # made tensors of the widest dtype: torch.where would take two Python floats to float32
    return torch.where(condition, as_scalar(yes, condition.device), as_scalar(no, condition.device))


def as_scalar(value: Any, device: torch.device) -> Tensor:
    """A number as a new 0-d tensor of the widest dtype."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=widest(device))
    return torch.full((), value, dtype=widest(device), device=device)


@lru_cache(maxsize=1024)
def constant(value: float, device: torch.device) -> Tensor:
    """Like `as_scalar`, but the same tensor for the same number: to be reported, never to be written or put in a state."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=widest(device), device=device)


def times(tensor: Tensor, factor: Any) -> Tensor:
    """`tensor * factor` in the dtype of `tensor`, also where it is 0-d itself and a 0-d factor would widen it."""
    if isinstance(tensor, fx.Proxy):
        return recorded(times, tensor, factor)
    product: Tensor = tensor * factor
    return product if product.dtype == tensor.dtype else product.to(tensor.dtype)


def recorded(function: Callable[..., Any], tensor: fx.Proxy, *args: Any) -> Any:
    """A call as a single operation of a traced rule."""
    numbers = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
    return tensor.tracer.create_proxy("call_function", function, (tensor, *numbers), {})


def device_of(tensors: dict[str, Tensor]) -> torch.device:
    """The device of the first tensor; the CPU where there is none."""
    for tensor in tensors.values():
        return tensor.device
    return torch.device("cpu")


def new_count(params: dict[str, Tensor]) -> Tensor:
    """A counter at zero, on the device of the first parameter."""
    return torch.zeros((), dtype=torch.int64, device=device_of(params))


def readable(count: Tensor) -> Any:
    """A counter for fast paths: a Python number on the CPU, where reading it waits for nothing, else the tensor."""
    return int(count) if count.is_cpu else count
