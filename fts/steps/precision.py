"""Precision policies: parameters stay as they are, computation runs in a lower precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fts.errors import ArgumentError

_POLICIES = {None: None, "bf16": torch.bfloat16}


def autocast_dtype(precision: str | None) -> torch.dtype | None:
    """The dtype that a policy computes in, or None for that of the parameters.

    Args:
        precision: None (no change), or "bf16" (`torch.autocast` to bfloat16 around the loss function).

    Raises:
        ArgumentError: the policy is unknown, or needs loss scaling.

    >>> autocast_dtype("bf16")
    torch.bfloat16
    """
    if precision == "fp16":
        raise ArgumentError("precision='fp16' needs loss scaling, which fts does not have yet. Use precision='bf16'.")
    if precision not in _POLICIES:
        raise ArgumentError(f"precision={precision!r} is unknown. Use None or 'bf16'.")
    return _POLICIES[precision]


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cache_enabled: bool | None = None
) -> AbstractContextManager[Any]:
    """The context in which a loss runs on a device; `cache_enabled` is torch's."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=cache_enabled)
