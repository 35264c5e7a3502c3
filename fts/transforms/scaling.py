"""Scaling of updates, and weight decay."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.errors import ArgumentError
from fts.transforms._checks import check_number, format_label, format_value, need_params
from fts.transforms._fast_paths import Update, fast_update, scale_in_place
from fts.transforms._learning_rates import Rate, check_rate, checking, rate_now, report, report_now
from fts.transforms._masks import Mask, Predicate, as_predicate, everything, format_mask
from fts.transforms._scalars import device_of, new_count, times
from fts.transforms.rules import elementwise
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

    return elementwise(lambda grad: times(grad, factor), label=format_label("scale", factor))


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

    return elementwise(
        lambda grad, factor: times(grad, factor),  # noqa: PLW0108 (the names of the arguments are what it asks for)
        ScheduleState,
        shared=lambda grads, state, params: {"factor": schedule(state.step)},
        label=format_label("scale_by_schedule", schedule),
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

    return Transform(init, update, update_=update_, check=checking(lr), label=f"scale_by_learning_rate({format_value(lr)})")


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

    decay = decayed_weights(weight_decay, None if mask is None else decays, "add_decayed_weights")

    def init(params: Params) -> OptState:
        check_names(params)
        return ()

    words = format_label("add_decayed_weights", weight_decay, mask=None if mask is None else format_mask(mask))
    return decay._replace(init=init, label=words)


def decayed_weights(weight_decay: float, decays: Predicate | None, function: str) -> Transform:
    """As `add_decayed_weights`, without its checks and for a predicate; messages name `function`."""

    def rule(grad: Tensor, param: Tensor) -> Tensor:
        return grad + weight_decay * param

    every = elementwise(rule, label=function)
    if decays is None:
        return every

    def some(update: Update) -> Update:
        def decayed(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
            weights = need_params(params, function)
            chosen = {name: grad for name, grad in grads.items() if decays(name, weights[name])}
            changed, _, _ = update(chosen, (), weights)
            return {**grads, **changed}, state, {}

        return decayed

    return every._replace(update=some(every.update), update_=some(fast_update(every)))
