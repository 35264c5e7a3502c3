"""Multiples of gradients and weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.errors import ArgumentError
from fts.transforms._arguments import check_number, in_words, need_params
from fts.transforms._inplace import scale_in_place
from fts.transforms._masks import Mask, as_predicate, everything, mask_in_words
from fts.transforms._rates import Rate, check_rate, checking, rate_now, report, report_now
from fts.transforms._scalars import device_of, new_count, readable, times
from fts.typing import Info, OptState, Params, Schedule, Transform


class ScheduleState(NamedTuple):
    """State of a transform that follows a schedule.

    Attributes:
        step: 0-d int64 tensor: the number of updates so far.
    """

    step: Tensor


def scale(factor: float | Tensor) -> Transform:
    """Multiply the gradients by a constant.

    Args:
        factor: a finite number of either sign, or a 0-d tensor.

    Returns:
        A transform without state.

    Raises:
        ArgumentError: `factor` is not a finite number.

    >>> scale(-0.1).update({"w": torch.tensor([2.0])}, (), None)[0]
    {'w': tensor([-0.2000])}
    """
    if not isinstance(factor, Tensor):
        check_number("scale: factor", factor, low=-math.inf)

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        return {name: times(g, factor) for name, g in grads.items()}, state, {}

    def update_(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        scale_in_place(grads.values(), factor)
        return grads, state, {}

    return Transform(lambda params: (), update, update_=update_, label=f"scale({in_words(factor)})")


def set_to_zero() -> Transform:
    """Replace every gradient by zero, also where it is not finite: what freezes a group in `partition`.

    Returns:
        A transform without state.

    >>> set_to_zero().update({"w": torch.tensor([2.0, float("nan")])}, (), None)[0]
    {'w': tensor([0., 0.])}
    """

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        return {name: torch.zeros_like(g) for name, g in grads.items()}, state, {}

    def update_(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        torch._foreach_zero_(local_tensors(grads.values()))
        return grads, state, {}

    def apply(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info]:
        return params, state, {}

    return Transform(lambda params: (), update, apply, update_, label="set_to_zero()")


def scale_by_schedule(schedule: Schedule) -> Transform:
    """Multiply the gradients by a schedule's value, of either sign.

    Args:
        schedule: a function of the number of updates before this one.

    Returns:
        A transform with `ScheduleState`.

    Raises:
        ArgumentError: `schedule` is not callable.

    >>> decay = scale_by_schedule(lambda step: 0.5**step)
    >>> grads = {"w": torch.tensor([2.0])}
    >>> updates, state, _ = decay.update(grads, decay.init(grads), None)
    >>> decay.update(grads, state, None)[0]
    {'w': tensor([1.])}
    """
    if not callable(schedule):
        raise ArgumentError(f"scale_by_schedule takes a function of the step, not {schedule!r}; use scale for a constant.")

    def update(grads: Params, state: ScheduleState, params: Params | None) -> tuple[Params, OptState, Info]:
        factor = schedule(state.step)
        return {name: times(g, factor) for name, g in grads.items()}, ScheduleState(state.step + 1), {}

    def update_(grads: Params, state: ScheduleState, params: Params | None) -> tuple[Params, OptState, Info]:
        factor = schedule(readable(state.step))
        state.step.add_(1)
        scale_in_place(grads.values(), factor)
        return grads, state, {}

    return Transform(
        lambda params: ScheduleState(new_count(params)), update, update_=update_, label=f"scale_by_schedule({in_words(schedule)})"
    )


def scale_by_learning_rate(lr: Rate) -> Transform:
    """Multiply the gradients by minus the learning rate: the last part of a descent.

    Args:
        lr: a number, a schedule, or a 0-d tensor.

    Returns:
        A transform with `ScheduleState` for a schedule, else without state. It reports `lr`.

    Raises:
        ArgumentError: `lr` is a negative number or not finite.
        ScheduleError: (in a step, or from `check`) the schedule returned such a number.

    >>> updates, _, info = scale_by_learning_rate(0.1).update({"w": torch.tensor([2.0])}, (), None)
    >>> updates["w"], info["lr"].item()
    (tensor([-0.2000]), 0.1)
    """
    check_rate("scale_by_learning_rate: lr", lr)

    def init(params: Params) -> OptState:
        return ScheduleState(new_count(params)) if callable(lr) else ()

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        rate = lr(state.step) if callable(lr) else lr
        updates = {name: times(g, -rate) for name, g in grads.items()}
        return updates, ScheduleState(state.step + 1) if callable(lr) else state, {"lr": report(rate, device_of(grads))}

    def update_(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        rate = rate_now(lr, state.step) if callable(lr) else lr
        if callable(lr):
            state.step.add_(1)
        scale_in_place(grads.values(), -rate)
        return grads, state, {"lr": report_now(lr, rate, device_of(grads))}

    return Transform(init, update, update_=update_, check=checking(lr), label=f"scale_by_learning_rate({in_words(lr)})")


def add_decayed_weights(weight_decay: float, mask: Mask | None = None) -> Transform:
    """Add a multiple of the parameters to the gradients.

    Args:
        weight_decay: the multiple, not negative.
        mask: which parameters: a predicate `(name, tensor) -> bool`, a dictionary name -> bool, or a collection of
            names; None means all.

    Returns:
        A transform without state; its `update` needs the parameters.

    Raises:
        ArgumentError: `weight_decay` is negative or not finite, the mask is none of these, or there are no parameters.
        UnknownParameterError: (in `init`) the mask names something that is no parameter.

    >>> add_decayed_weights(0.1).update({"w": torch.tensor([1.0])}, (), {"w": torch.tensor([5.0])})[0]
    {'w': tensor([1.5000])}

    Source: Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization", where it follows Adam's scaling.
    """
    check_number("add_decayed_weights: weight_decay", weight_decay)
    decays, check_names = as_predicate(everything if mask is None else mask, "add_decayed_weights")

    def init(params: Params) -> OptState:
        check_names(params)
        return ()

    def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        weights = need_params(params, "add_decayed_weights")
        updates = {
            name: g + times(weights[name], weight_decay) if decays(name, weights[name]) else g for name, g in grads.items()
        }
        return updates, state, {}

    def update_(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
        weights = need_params(params, "add_decayed_weights")
        names = [name for name in grads if decays(name, weights[name])]
        if names:
            torch._foreach_add_(
                local_tensors(grads[name] for name in names), local_tensors(weights[name] for name in names), alpha=weight_decay
            )
        return grads, state, {}

    words = in_words(weight_decay) if mask is None else f"{in_words(weight_decay)}, mask={mask_in_words(mask)}"
    return Transform(init, update, update_=update_, label=f"add_decayed_weights({words})")
