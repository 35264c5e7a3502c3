"""How NVIDIA GPUs multiply float32 matrices: a setting of torch for the process, as in Hugging Face's arguments."""

from __future__ import annotations

from typing import Any

import torch


def has_tf32() -> bool:
    """Whether there is a GPU that computes in TF32."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def apply_tf32(tf32: bool | None, *, torch_compile: bool, fp16: bool) -> None:
    """Turn TF32 on or off.

    Args:
        tf32: the argument; None turns it on where the step is compiled, and else changes nothing.
        torch_compile: whether the step is compiled.
        fp16: whether it computes in float16.
    """
    if tf32 is None and torch_compile and not fp16:
        tf32 = True
    if tf32 is not None and has_tf32():
        backends: Any = torch.backends  # its stubs lack the name
        backends.fp32_precision = "tf32" if tf32 else "ieee"
