"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fts.transforms._checks import check_decays, check_numbers, format_label
from fts.transforms._learning_rates import Rate
from fts.transforms._masks import Mask, format_mask
from fts.transforms.optimizers import FusedKernel, optimizer
from fts.transforms.rules import bias_correction, elementwise
from fts.typing import Number, Params, Transform

Tensors: TypeAlias = list[Tensor]


class AdamState(NamedTuple):
    """State of `scale_by_adam`, `adam` and `adamw`.

    Attributes:
        step: 0-d int64 tensor: the number of updates so far.
        mu: running means of the gradients, by parameter name.
        nu: running means of their squares.
    """

    step: Tensor
    mu: Params
    nu: Params


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transform:
    """Divide the running mean of the gradients by the root of the running mean of their squares.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the mean of squares, in [0, 1).
        eps: is added to the root.

    Returns:
        A transform with `AdamState`.

    Raises:
        ArgumentError: a number is out of range.

    >>> scaler = scale_by_adam()
    >>> grads = {"w": torch.tensor([0.5, -3.0])}
    >>> scaler.update(grads, scaler.init(grads), None)[0]
    {'w': tensor([ 1., -1.])}

    Source: Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1.
    """
    check_decays("scale_by_adam", b1=b1, b2=b2)
    check_numbers("scale_by_adam", eps=eps)

    def rule(grad: Tensor, step: Any, mu: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # lerp(a, b, w) is a + w (b - a): the same mean, also to the last bit of the fused kernels
        mu = torch.lerp(mu, grad, 1 - b1)
        nu = b2 * nu + (1 - b2) * grad * grad
        return bias_correction(mu, b1, step) / (bias_correction(nu, b2, step).sqrt() + eps), mu, nu

    return elementwise(rule, AdamState, label=f"scale_by_adam(b1={b1}, b2={b2}, eps={eps})")


def adam(lr: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> Transform:
    """Adam, as `torch.optim.Adam`.

    Args:
        lr: learning rate: a number, a schedule, or a 0-d tensor.
        b1: decay of the mean of the gradients, in [0, 1).
        b2: decay of the mean of their squares, in [0, 1).
        eps: is added to the root of the mean of squares.
        weight_decay: the multiple of the parameters that is added to the gradients (L2 regularisation).

    Returns:
        A transform with `AdamState`. It reports `lr`.

    Raises:
        ArgumentError: a number is out of range.
        ScheduleError: (in a step, or from `check`) the schedule returned a negative rate or one that is not finite.

    >>> descent = adam(0.1)
    >>> params = {"w": torch.tensor([1.0])}
    >>> descent.update({"w": torch.tensor([20.0])}, descent.init(params), params)[0]
    {'w': tensor([-0.1000])}

    Source: as for `scale_by_adam`.
    """
    check_decays("adam", b1=b1, b2=b2)
    check_numbers("adam", eps=eps)
    return optimizer(
        "adam",
        scale_by_adam(b1, b2, eps),
        lr,
        weight_decay=weight_decay,
        decoupled=False,
        fused=_fused(torch._fused_adam_, b1, b2, eps),
    )


def adamw(
    lr: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Mask | None = None,
) -> Transform:
    """AdamW, as `torch.optim.AdamW`: Adam whose weight decay is not scaled by the moments.

    Args:
        lr: learning rate: a number, a schedule, or a 0-d tensor.
        b1: decay of the mean of the gradients, in [0, 1).
        b2: decay of the mean of their squares, in [0, 1).
        eps: is added to the root of the mean of squares.
        weight_decay: the fraction of a parameter that is taken off in an update, before it is multiplied by `lr`.
        mask: which parameters decay: a predicate `(name, tensor) -> bool`, a dictionary name -> bool, or a collection
            of names; None means all. The others are updated without decay.

    Returns:
        A transform with `AdamState`. It reports `lr`.

    Raises:
        ArgumentError: a number is out of range, or the mask is none of these.
        UnknownParameterError: (in `init`) the mask names something that is no parameter.
        ScheduleError: (in a step, or from `check`) the schedule returned a negative rate or one that is not finite.

    >>> descent = adamw(0.1, weight_decay=0.5)
    >>> params = {"w": torch.tensor([1.0])}
    >>> descent.update({"w": torch.tensor([20.0])}, descent.init(params), params)[0]
    {'w': tensor([-0.1500])}

    Source: Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """
    check_decays("adamw", b1=b1, b2=b2)
    check_numbers("adamw", eps=eps)
    descent = optimizer(
        "adamw",
        scale_by_adam(b1, b2, eps),
        lr,
        weight_decay=weight_decay,
        mask=mask,
        fused=_fused(torch._fused_adamw_, b1, b2, eps),
    )
    shown = None if mask is None else format_mask(mask)
    return descent._replace(label=format_label("adamw", lr=lr, weight_decay=weight_decay, mask=shown))


def _fused(kernel: Callable[..., None], b1: float, b2: float, eps: float) -> FusedKernel:
    def run(params: Tensors, grads: Tensors, mu: Tensors, nu: Tensors, *, lr: Number, weight_decay: float, step: Tensor) -> None:
        kernel(
            params,
            grads,
            mu,
            nu,
            [],
            [step.float()] * len(params),
            lr=lr,
            beta1=b1,
            beta2=b2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    return FusedKernel(run, ("mu", "nu"))
