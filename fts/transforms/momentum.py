"""Momentum and stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fts.errors import ArgumentError
from fts.transforms._checks import check_decays, check_numbers, format_label
from fts.transforms._learning_rates import Rate
from fts.transforms._scalars import choose, times
from fts.transforms.optimizers import FusedKernel, optimizer
from fts.transforms.rules import elementwise
from fts.typing import Params, Transform

Tensors: TypeAlias = Sequence[Tensor]


class TraceState(NamedTuple):
    """State of `trace`.

    Attributes:
        trace: the decayed sums of past gradients, by parameter name.
    """

    trace: Params


class SgdState(NamedTuple):
    """State of `sgd`.

    Attributes:
        step: 0-d int64 tensor: the number of updates so far.
        trace: the momentum buffers by parameter name; empty without momentum.
    """

    step: Tensor
    trace: Params


def trace(decay: float, nesterov: bool = False) -> Transform:
    """Replace gradients by the decayed sum of the gradients so far: momentum.

    Args:
        decay: the factor of the older sum, in [0, 1).
        nesterov: look one step ahead: return `grad + decay * sum`.

    Returns:
        A transform with `TraceState`.

    Raises:
        ArgumentError: `decay` is outside [0, 1).

    >>> heavy = trace(0.9)
    >>> grads = {"w": torch.tensor([1.0])}
    >>> _, state, _ = heavy.update(grads, heavy.init(grads), None)
    >>> heavy.update(grads, state, None)[0]
    {'w': tensor([1.9000])}

    Source: Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum in deep learning".
    """
    check_decays("trace", decay=decay)

    def rule(grad: Tensor, trace: Tensor) -> tuple[Tensor, Tensor]:
        trace = grad + decay * trace
        return grad + decay * trace if nesterov else trace, trace

    return elementwise(rule, TraceState, label=format_label("trace", decay, nesterov=nesterov))


def sgd(lr: Rate, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False) -> Transform:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Args:
        lr: learning rate: a number, a schedule, or a 0-d tensor.
        momentum: the factor of the older sum of gradients, in [0, 1).
        dampening: how much less of a gradient enters the sum, from the second update on.
        weight_decay: the multiple of the parameters that is added to the gradients (L2 regularisation).
        nesterov: look one step ahead.

    Returns:
        A transform with `SgdState`. It reports `lr`.

    Raises:
        ArgumentError: a number is out of range, or `nesterov` is used without momentum or with dampening.
        ScheduleError: (in a step, or from `check`) the schedule returned a negative rate or one that is not finite.

    >>> from fts.transforms import apply_updates
    >>> params, grads = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
    >>> descent = sgd(0.1)
    >>> updates, state, info = descent.update(grads, descent.init(params), params)
    >>> apply_updates(params, updates)
    {'w': tensor([0.8000])}

    Source: as for `trace`; the placement of the learning rate outside the sum is torch.optim's.
    """
    check_decays("sgd", momentum=momentum)
    check_numbers("sgd", dampening=dampening)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ArgumentError(
            f"sgd: nesterov needs a momentum above 0 and no dampening, not momentum={momentum}, dampening={dampening}."
        )

    def rule(grad: Tensor, step: Any, trace: Tensor) -> tuple[Tensor, Tensor]:
        # the first gradient is not damped, as in torch
        share = times(grad, choose(step == 1, 1.0, 1.0 - dampening)) if dampening else grad
        trace = momentum * trace + share
        return grad + momentum * trace if nesterov else trace, trace

    def run(params: Tensors, grads: Tensors, traces: Tensors = (), *, step: Tensor, **options: Any) -> None:
        first = bool(dampening) and int(step) == 1
        options |= {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        torch._fused_sgd_(list(params), list(grads), list(traces), **options, maximize=False, is_first_step=first)

    return optimizer(
        "sgd",
        elementwise(rule, SgdState, label="momentum")
        if momentum
        else elementwise(lambda grad: grad, SgdState, init={"trace": None}, label="identity"),
        lr,
        weight_decay=weight_decay,
        decoupled=False,
        # torch 2.13's kernel silently leaves bfloat16 and float16 on the CPU as they were
        fused=FusedKernel(run, ("trace",) if momentum else (), half_on_cpu=False, reads_step=bool(dampening)),
        label=format_label(
            "sgd",
            lr=lr,
            momentum=momentum or None,
            dampening=dampening or None,
            weight_decay=weight_decay or None,
            nesterov=nesterov,
        ),
    )
