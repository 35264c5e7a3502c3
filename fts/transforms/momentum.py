"""Momentum and stochastic gradient descent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.errors import ArgumentError
from fts.transforms._arguments import check_number, in_words, need_params
from fts.transforms._inplace import added, for_kernel, fused_lists, scale_in_place
from fts.transforms._rates import Rate, check_rate, checking, rate_at, rate_now, report, report_now
from fts.transforms._scalars import choose, new_count, readable, times
from fts.typing import Info, OptState, Params, Transform


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
    check_number("trace: decay", decay, high=1.0)

    def init(params: Params) -> OptState:
        return TraceState({name: torch.zeros_like(p) for name, p in params.items()})

    def update(grads: Params, state: TraceState, params: Params | None) -> tuple[Params, OptState, Info]:
        sums = {name: g + decay * state.trace[name] for name, g in grads.items()}
        updates = {name: g + decay * sums[name] for name, g in grads.items()} if nesterov else sums
        return updates, TraceState(sums), {}

    def update_(grads: Params, state: TraceState, params: Params | None) -> tuple[Params, OptState, Info]:
        slopes, sums = local_tensors(grads.values()), local_tensors(state.trace[name] for name in grads)
        torch._foreach_mul_(sums, decay)
        torch._foreach_add_(sums, slopes)
        if nesterov:
            torch._foreach_add_(slopes, sums, alpha=decay)
        else:
            torch._foreach_copy_(slopes, sums)  # what follows may overwrite the updates, never the state
        return grads, state, {}

    return Transform(init, update, update_=update_, label=f"trace({decay}{', nesterov' if nesterov else ''})")


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
    check_rate("sgd: lr", lr)
    check_number("sgd: momentum", momentum, high=1.0)
    check_number("sgd: dampening", dampening)
    check_number("sgd: weight_decay", weight_decay)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ArgumentError(
            f"sgd: nesterov needs a momentum above 0 and no dampening, not momentum={momentum}, dampening={dampening}."
        )

    def init(params: Params) -> OptState:
        return SgdState(new_count(params), {name: torch.zeros_like(p) for name, p in params.items()} if momentum else {})

    def update(grads: Params, state: SgdState, params: Params | None) -> tuple[Params, OptState, Info]:
        rate = rate_at(lr, state.step)
        sums: Params = {}
        if weight_decay:
            weights = need_params(params, "sgd with weight_decay")
            grads = {name: g + weight_decay * weights[name] for name, g in grads.items()}
        if momentum:
            # the first gradient enters whole, as in torch
            share = choose(state.step == 0, 1.0, 1.0 - dampening) if dampening else 1.0
            sums = {name: momentum * state.trace[name] + times(g, share) for name, g in grads.items()}
            grads = {name: g + momentum * sums[name] for name, g in grads.items()} if nesterov else sums
        updates = {name: times(g, -rate) for name, g in grads.items()}
        return updates, SgdState(state.step + 1, sums), {"lr": report(rate, state.step.device)}

    def update_(grads: Params, state: SgdState, params: Params | None) -> tuple[Params, OptState, Info]:
        rate = rate_now(lr, state.step)
        slopes, sums = local_tensors(grads.values()), local_tensors(state.trace[name] for name in grads) if momentum else []
        if weight_decay:
            weights = need_params(params, "sgd with weight_decay")
            torch._foreach_add_(slopes, local_tensors(weights[name] for name in grads), alpha=weight_decay)
        if momentum:
            torch._foreach_mul_(sums, momentum)
            if dampening:
                scale_in_place(slopes, choose(readable(state.step) == 0, 1.0, 1.0 - dampening))
            torch._foreach_add_(sums, slopes)
            if nesterov:
                torch._foreach_add_(slopes, sums, alpha=momentum)
            else:
                torch._foreach_copy_(slopes, sums)
        scale_in_place(slopes, -rate)
        info = {"lr": report_now(lr, rate, state.step.device)}
        state.step.add_(1)
        return grads, state, info

    slow_apply = added(update_)

    def apply(grads: Params, state: SgdState, params: Params) -> tuple[Params, OptState, Info]:
        lists = fused_lists(params, grads, *([state.trace] if momentum else []), half_on_cpu=False)
        # whether this is the first update matters to the kernel with dampening alone, and can be read on the CPU alone
        if lists is None or (dampening and not state.step.is_cpu):
            return slow_apply(grads, state, params)
        rate = rate_now(lr, state.step)
        first = bool(dampening) and int(state.step) == 0
        torch._fused_sgd_(
            lists[0],
            lists[1],
            lists[2] if momentum else [],
            weight_decay=weight_decay,
            momentum=momentum,
            lr=for_kernel(rate),
            dampening=dampening,
            nesterov=nesterov,
            maximize=False,
            is_first_step=first,
        )
        info = {"lr": report_now(lr, rate, state.step.device)}
        state.step.add_(1)
        return params, state, info

    words = _sgd_in_words(lr, momentum, dampening, weight_decay, nesterov)
    return Transform(init, update, apply, update_, checking(lr), words)


def _sgd_in_words(lr: Rate, momentum: float, dampening: float, weight_decay: float, nesterov: bool) -> str:
    words = [f"lr={in_words(lr)}"]
    words += [
        f"{name}={in_words(value)}"
        for name, value in (("momentum", momentum), ("dampening", dampening), ("weight_decay", weight_decay))
        if value
    ]
    return f"sgd({', '.join(words + (['nesterov'] if nesterov else []))})"
