"""Precision policies: parameters stay as they are, computation runs in a lower precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from fts.errors import ArgumentError
from fts.transforms.loss_scaling import find_loss_scale
from fts.typing import OptState, Params

_POLICIES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str | None) -> torch.dtype | None:
    """The dtype that a policy computes in, or None for that of the parameters.

    Args:
        precision: None (no change), "bf16" or "fp16" (`torch.autocast` to bfloat16 or float16 around the loss function).

    Raises:
        ArgumentError: the policy is unknown.

    >>> autocast_dtype("bf16")
    torch.bfloat16
    """
    if precision not in _POLICIES:
        raise ArgumentError(f"precision={precision!r} is unknown. Use None, 'bf16' or 'fp16'.")
    return _POLICIES[precision]


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cache_enabled: bool | None = None
) -> AbstractContextManager[Any]:
    """The context in which a loss runs on a device; `cache_enabled` is torch's."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=cache_enabled)


def scale_of(opt_state: OptState, precision: str | None) -> Tensor | None:
    """What a loss is multiplied by before its backward pass: the scale in the optimizer's state, whatever the precision.

    Args:
        opt_state: of the state that a step is at.
        precision: "fp16" needs a scale.

    Returns:
        A 0-d float32 tensor; None where there is none.

    Raises:
        ArgumentError: there is none, and the precision needs one.
    """
    scale = find_loss_scale(opt_state)
    if scale is None and precision == "fp16":
        raise ArgumentError(
            "precision='fp16' needs a loss scale, without which small gradients vanish: wrap the whole optimizer, as in "
            "tx.dynamic_loss_scale(tx.adamw(1e-3)), for the step and for TrainState.create. Or use precision='bf16'."
        )
    return scale


def scaled(loss: Tensor, scale: Tensor | None) -> Tensor:
    """A loss, multiplied by a scale if there is one."""
    return loss if scale is None else loss * scale.to(loss.device)


def unscaled(grads: Params, scale: Tensor | None) -> Params:
    """Gradients as those of the loss that was not multiplied."""
    return grads if scale is None else {name: grad / scale for name, grad in grads.items()}


@attrs.define(eq=False)
class Scaler:
    """Multiplies the losses of a function that calls backward itself: `scaler.scale(loss).backward()`, as torch's GradScaler.

    Attributes:
        factor: the scale of the state that a step is at, which `manual_backward` sets; None: losses stay as they are.
        used: whether a loss was scaled since.
    """

    factor: Tensor | None = None
    used: bool = False

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        self.used = True
        return scaled(loss, self.factor)
