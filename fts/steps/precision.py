"""Mixed precision and loss scaling: parameters keep their dtype, the loss is computed in a lower precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor

from fts.errors import ArgumentError
from fts.transforms.loss_scaling import find_loss_scale
from fts.typing import OptState, Params

_AUTOCAST_DTYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_dtype(precision: str | None) -> torch.dtype | None:
    """The autocast dtype of a precision, or None for that of the parameters.

    Args:
        precision: None (no change), "bf16" or "fp16" (`torch.autocast` to bfloat16 or float16 around the loss function).

    Raises:
        ArgumentError: the precision is unknown.

    >>> autocast_dtype("bf16")
    torch.bfloat16
    """
    if precision not in _AUTOCAST_DTYPES:
        raise ArgumentError(f"precision={precision!r} is unknown. Use None, 'bf16' or 'fp16'.")
    return _AUTOCAST_DTYPES[precision]


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cache_enabled: bool | None = None
) -> AbstractContextManager[Any]:
    """The autocast context of a loss; `cache_enabled` is torch's."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=cache_enabled)


def get_loss_scale(opt_state: OptState, precision: str | None) -> Tensor | None:
    """The loss scale in the optimizer's state, for any precision.

    Args:
        opt_state: of the current state.
        precision: "fp16" needs a scale.

    Returns:
        A 0-d float32 tensor, or None.

    Raises:
        ArgumentError: the precision needs a loss scale, and there is none.
    """
    scale = find_loss_scale(opt_state)
    if scale is None and precision == "fp16":
        raise ArgumentError(
            "precision='fp16' needs a loss scale, without which small gradients vanish: wrap the complete optimizer, as in "
            "tx.dynamic_loss_scale(tx.adamw(1e-3)), for the step and for TrainState.create. Or use precision='bf16'."
        )
    return scale


def scale_loss(loss: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply a loss by the loss scale, if there is one."""
    return loss if scale is None else loss * scale.to(loss.device)


def unscale_gradients(grads: Params, scale: Tensor | None) -> Params:
    """Divide gradients by the loss scale, if there is one."""
    return grads if scale is None else {name: grad / scale for name, grad in grads.items()}


@attrs.define(eq=False)
class LossScaler:
    """Scales the losses of a function that calls backward itself: `scaler.scale(loss).backward()`, like torch's GradScaler.

    Attributes:
        factor: the loss scale of the current state, set by `manual_backward`; None for no scaling.
        used: whether a loss was scaled since then.
    """

    factor: Tensor | None = None
    used: bool = False

    def scale(self, loss: Tensor) -> Tensor:
        """The scaled loss, to call `backward` on."""
        self.used = True
        return scale_loss(loss, self.factor)
