"""Linear layers that multiply in float8, by torchao."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from fts.errors import ArgumentError, MissingDependencyError

SETTING = "mixed_precision 'fp8' (ACCELERATE_MIXED_PRECISION, accelerate launch --mixed_precision fp8)"


def check_float8(device: torch.device) -> None:
    """Raise where a machine cannot train in float8.

    Args:
        device: on which the model is trained.

    Raises:
        ArgumentError: the device does not multiply in float8.
        MissingDependencyError: torchao is not installed.

    >>> check_float8(torch.device("cpu"))
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: mixed_precision 'fp8' ... needs an NVIDIA GPU that multiplies in float8 ...
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type!r}"
        raise ArgumentError(
            f"{SETTING} needs an NVIDIA GPU that multiplies in float8 (Ada, Hopper or newer: compute capability 8.9); this run "
            f"is on {found}. Use bf16=True."
        )
    if importlib.util.find_spec("torchao") is None:
        raise MissingDependencyError(f"{SETTING} needs the package torchao: pip install torchao. Or use bf16=True.")


def convert_to_float8(model: nn.Module, config: Any = None) -> nn.Module:
    """Let the linear layers of a model multiply in float8, in place; their parameters keep their names, dtypes and values.

    The first and the last linear layer stay as they are, as in accelerate, and so do those whose sizes 16 does not divide, for
    which float8 has no kernels.

    Args:
        model: any module.
        config: torchao's `Float8LinearConfig`; None scales each tensor by its largest number, anew at each multiplication.

    Returns:
        The model.
    """
    from torchao.float8 import convert_to_float8_training

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inner = set(names[1:-1])

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name in inner and not (module.in_features % 16 or module.out_features % 16)

    converted: nn.Module = convert_to_float8_training(model, config=config, module_filter_fn=fits)
    return converted
