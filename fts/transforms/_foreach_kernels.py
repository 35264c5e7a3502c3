"""Kernels on lists of tensors by operation, in place and with new results; numbers may be 0-d tensors on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fts.transforms._fast_paths import scale_, wide_dtype
from fts.transforms._tracing import UNARY

COMMUTATIVE = frozenset({"add", "maximum", "minimum", "mul"})


def clone(tensors: list[Tensor]) -> list[Tensor]:
    """Copies."""
    return [tensor.clone() for tensor in tensors]


def _named(kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
    kernel.__name__ = name
    return kernel


def _scale_(x: list[Tensor], factor: Any) -> None:
    own = None if isinstance(factor, Tensor) or not x[0].is_cpu else wide_dtype(x)
    # a 0-d tensor is faster; but in 16 bits a number rounds otherwise than a tensor
    torch._foreach_mul_(x, factor if own is None else torch.full((), factor, dtype=own))


def _add_scaled(add: Any) -> Callable[..., Any]:
    def kernel(x: list[Tensor], y: list[Tensor], factor: Any) -> Any:
        # alpha cannot be a tensor
        return add(x, torch._foreach_mul(y, factor)) if isinstance(factor, Tensor) else add(x, y, alpha=factor)

    return _named(kernel, "add_scaled")


def _add_product(name: str, suffix: str) -> Callable[..., Any]:
    addc, add = getattr(torch, f"_foreach_addc{name}{suffix}"), getattr(torch, f"_foreach_add{suffix}")
    combine = getattr(torch, f"_foreach_{name}")

    def kernel(x: list[Tensor], y: list[Tensor], z: list[Tensor], factor: Any) -> Any:
        if isinstance(factor, Tensor):
            return add(x, combine(torch._foreach_mul(y, factor), z))
        return addc(x, y, z, factor)

    return _named(kernel, f"addc{name}")


def _lerp(suffix: str) -> Callable[..., Any]:
    lerp, add = getattr(torch, f"_foreach_lerp{suffix}"), getattr(torch, f"_foreach_add{suffix}")

    def kernel(x: list[Tensor], y: list[Tensor], weight: Any) -> Any:
        if isinstance(weight, Tensor):
            return add(x, torch._foreach_mul(torch._foreach_sub(y, x), weight))
        return lerp(x, y, weight)

    return _named(kernel, "lerp")


def _with_number(name: str, suffix: str) -> Callable[..., Any]:
    function, method = getattr(torch, f"_foreach_{name}{suffix}"), f"{name}{suffix}"

    def kernel(x: list[Tensor], number: Any) -> Any:
        if isinstance(number, Tensor):  # the kernel on lists would wait for its value
            return [getattr(tensor, method)(number) for tensor in x]
        return function(x, number)

    return _named(kernel, name)


def _kernels(suffix: str) -> dict[str, Callable[..., Any]]:
    lists = (*COMMUTATIVE, "div", "sub", *UNARY)
    scale, times = (_scale_, scale_) if suffix else (torch._foreach_mul, torch._foreach_mul)
    return (
        {name: getattr(torch, f"_foreach_{name}{suffix}") for name in lists}
        | {
            "scale": scale,
            "times": times,
            "debias": times,
            "add_scalar": _with_number("add", suffix),
            "div_scalar": getattr(torch, f"_foreach_div{suffix}"),
            "add_scaled": _add_scaled(getattr(torch, f"_foreach_add{suffix}")),
            "addcmul": _add_product("mul", suffix),
            "addcdiv": _add_product("div", suffix),
            "lerp": _lerp(suffix),
        }
        | {name: _with_number(name, suffix) for name in ("clamp_max", "clamp_min", "pow")}
    )


IN_PLACE, NEW = _kernels("_"), _kernels("")
