"""Losses that are multiplied before the backward pass, so that gradients in float16 do not vanish."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.errors import ArgumentError, NonFiniteError
from fts.transforms._checks import check_count, check_number, check_transform
from fts.transforms._fast_paths import WIDE_DTYPES, fast_apply, is_fast, pure_apply, scale_in_place
from fts.transforms._info import merged, values_of
from fts.transforms._scalars import device_of, new_count, times, widest
from fts.transforms._skipping import (
    all_finite,
    all_finite_now,
    check_unless_withheld,
    counted,
    counted_now,
    skip_report,
    withheld_now_unless,
    withheld_unless,
)
from fts.typing import Info, OptState, Params, Transform

LEAST_SCALE = 2.0**-14
"""A scale that falls below this will not help any more: the gradients are not finite for another reason."""


class LossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`.

    Attributes:
        inner: the state of the inner transform.
        scale: 0-d float32 tensor: what the loss of the next step is multiplied by.
        growth_tracker: 0-d int64 tensor: how many updates were finite since the scale last changed.
        total: 0-d int64 tensor: how many updates were skipped.
        in_a_row: 0-d int64 tensor: how many were skipped since the last one that was not.
    """

    inner: OptState
    scale: Tensor
    growth_tracker: Tensor
    total: Tensor
    in_a_row: Tensor


class _LossScale(Transform):
    """A transform that unscales gradients, so that others know it."""


def dynamic_loss_scale(
    inner: Transform,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> Transform:
    """Divide the gradients of a loss that was multiplied by a scale, and find the largest scale that does not overflow.

    Steps multiply the loss by the scale in their state; `loss_scale` finds it. Where a gradient is not finite, the update is
    skipped (the state of `inner` stays as it was) and the scale shrinks; after many finite updates it grows. As
    `torch.amp.GradScaler` does.

    Args:
        inner: the transform of unscaled gradients; clipping is inside. Around it may be `ema_params`, `multi_steps`, and
            `master_weights`, which float16 parameters need: their gradients would vanish again when they are unscaled.
        init_scale: the scale of the first step, positive.
        growth_factor: the scale is multiplied by it after `growth_interval` finite updates in a row; above 1.
        backoff_factor: the scale is multiplied by it after an update that is not finite; in (0, 1).
        growth_interval: see `growth_factor`.

    Returns:
        A transform with `LossScaleState`. Next to what `inner` reports, it reports `loss_scale` (that of the step that was
        taken), `skipped` (0 or 1), `skipped_total` and `skipped_in_a_row`.

    Raises:
        ArgumentError: `inner` is no transform or scales the loss itself, or a number is out of its range.
        NonFiniteError: (from `check`) gradients overflow although the scale is below 2**-14.

    >>> from fts import transforms as tx
    >>> scaled = tx.dynamic_loss_scale(tx.sgd(0.1), init_scale=8.0)
    >>> params = {"w": torch.tensor([1.0])}
    >>> state = scaled.init(params)
    >>> updates, state, info = scaled.update({"w": torch.tensor([16.0])}, state, params)
    >>> updates["w"]
    tensor([-0.2000])
    >>> updates, state, info = scaled.update({"w": torch.tensor([float("inf")])}, state, params)
    >>> updates["w"], info["skipped"], tx.loss_scale(state)
    (tensor([0.]), tensor(1), tensor(4.))

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; the rule is that of `torch.amp.GradScaler`.
    """
    check_transform("dynamic_loss_scale", inner)
    if unscales(inner):
        raise ArgumentError("dynamic_loss_scale: the transform inside has a loss scale already. A loss is multiplied once.")
    check_number("dynamic_loss_scale: init_scale", init_scale, open_low=True)
    check_number("dynamic_loss_scale: growth_factor", growth_factor, low=1.0, open_low=True)
    check_number("dynamic_loss_scale: backoff_factor", backoff_factor, high=1.0, open_low=True)
    check_count("dynamic_loss_scale: growth_interval", growth_interval, low=1)

    def init(params: Params) -> OptState:
        scale = torch.full((), init_scale, dtype=torch.float32, device=device_of(params))
        return LossScaleState(inner.init(params), scale, *(new_count(params) for _ in range(3)))

    def moved(finite: Tensor, state: LossScaleState) -> tuple[Tensor, Tensor]:
        """The scale and the count after an update."""
        count = torch.where(finite, state.growth_tracker + 1, 0)
        exact = state.scale.to(widest(state.scale.device))  # as torch multiplies
        grown, shrunk = (exact * growth_factor).float(), (exact * backoff_factor).float()
        due = (count >= growth_interval) & grown.isfinite()
        scale = torch.where(finite, torch.where(due, grown, state.scale), shrunk)
        return scale, torch.where(count >= growth_interval, 0, count)

    def update(grads: Params, state: LossScaleState, params: Params | None) -> tuple[Params, OptState, Info]:
        inverse = state.scale.to(widest(state.scale.device)).reciprocal()
        grads = {name: _unscaled(g, inverse.to(g.device)) for name, g in grads.items()}
        finite = all_finite(grads, state.scale.device)
        updates, inner_state, info = withheld_unless(finite, inner, grads, state.inner, params)
        skipped, total, in_a_row = counted(finite, state.total, state.in_a_row)
        report = {"loss_scale": state.scale.clone(), **skip_report(skipped, total, in_a_row)}
        return updates, LossScaleState(inner_state, *moved(finite, state), total, in_a_row), merged([info, report])

    def check(info: Info) -> None:
        check_unless_withheld(inner, info, "skipped")
        for key, value in values_of(info, "loss_scale"):
            in_a_row = info.get(key.replace("loss_scale", "skipped_in_a_row"))
            if in_a_row is not None and int(in_a_row) and float(value) < LEAST_SCALE:
                raise NonFiniteError(
                    f"The gradients were NaN or infinite in {int(in_a_row)} updates in a row, and the loss scale has fallen to "
                    f"{float(value):g}: overflow of float16 by the scale is not the cause. The parameters are those of the last "
                    "finite update. Look for log(0), 0/0 or overflow in the forward pass and for bad numbers in the batch, or "
                    "compute in bfloat16, which has the range of float32."
                )

    label = f"dynamic_loss_scale({init_scale:g}, {growth_factor:g}, {backoff_factor:g}, {growth_interval})"
    this = _LossScale(init, update, check=check, label=label, children=(inner,))
    inner_apply, slow_apply = fast_apply(inner), pure_apply(this)

    def apply(grads: Params, state: LossScaleState, params: Params) -> tuple[Params, OptState, Info]:
        if not state.scale.is_cpu:
            return slow_apply(grads, state, params)
        report = {"loss_scale": state.scale.clone()}
        inverse = 1.0 / float(state.scale) if float(state.scale) else math.inf
        _unscale_in_place(grads, inverse)
        finite = all_finite_now(grads)
        params, inner_state, info = withheld_now_unless(finite, inner, inner_apply, grads, state.inner, params)
        report |= skip_report(*counted_now(finite, state.total, state.in_a_row))
        scale, count = moved(torch.full((), finite), state)
        return params, LossScaleState(inner_state, scale, count, state.total, state.in_a_row), merged([info, report])

    return this._replace(apply=apply if is_fast(inner) else None)


def loss_scale(opt_state: OptState) -> Tensor:
    """What the loss of the next step is multiplied by, wherever `dynamic_loss_scale` stands in a transform.

    Args:
        opt_state: the state of a transform that contains `dynamic_loss_scale`.

    Returns:
        The state's own 0-d float32 tensor, not a copy.

    Raises:
        ArgumentError: there is no scale in it, or more than one.

    >>> from fts import transforms as tx
    >>> loss_scale(tx.ema_params(tx.dynamic_loss_scale(tx.sgd(0.1)), 0.99).init({"w": torch.tensor([1.0])}))
    tensor(65536.)
    """
    scale = find_loss_scale(opt_state)
    if scale is None:
        raise ArgumentError("There is no loss scale in this state: wrap the transform in dynamic_loss_scale(transform).")
    return scale


def find_loss_scale(opt_state: OptState) -> Tensor | None:
    """As `loss_scale`; None where there is none.

    Raises:
        ArgumentError: there is more than one.
    """
    # steps ask each time, so this visits no tensor by itself: most of a state are tensors by parameter name
    found: list[LossScaleState] = []
    waiting = [opt_state]
    while waiting:
        node = waiting.pop()
        if isinstance(node, LossScaleState):
            found.append(node)
        elif isinstance(node, dict):
            waiting += [child for child in node.values() if type(child) is not Tensor]
        elif isinstance(node, (tuple, list)):
            waiting += [child for child in node if type(child) is not Tensor]
    if len(found) > 1:
        raise ArgumentError(f"There are {len(found)} loss scales in this state; one is enough. Wrap all of it once.")
    return found[0].scale if found else None


_MAY_BE_AROUND = ("chain", "ema_params", "multi_steps", "master_weights", "stochastic_rounding", "skip_nonfinite")
"""Transforms that hand all gradients to (the first of) those inside, and change them at most by a factor for all."""


def unscales(transform: Transform) -> bool:
    """Whether there is a `dynamic_loss_scale` in a transform, as far as it names its children."""
    return isinstance(transform, _LossScale) or any(map(unscales, transform.children))


def check_unscales_first(transform: Transform) -> None:
    """Raise ArgumentError where gradients get to something else before `dynamic_loss_scale` has unscaled them.

    >>> from fts import transforms as tx
    >>> check_unscales_first(tx.chain(tx.clip_by_global_norm(1.0), tx.dynamic_loss_scale(tx.sgd(0.1))))
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: dynamic_loss_scale stands inside chain, where ...
    """
    at = transform
    while not isinstance(at, _LossScale):
        if not unscales(at):
            return
        if at.label.partition("(")[0] not in _MAY_BE_AROUND or not unscales(at.children[0]):
            raise ArgumentError(
                f"dynamic_loss_scale stands inside {at.label.partition('(')[0]}, where some gradients are used before they are "
                "unscaled. Put everything else inside it: dynamic_loss_scale(chain(clip_by_global_norm(1.0), adamw(1e-3)))."
            )
        at = at.children[0]


def _unscaled(grad: Tensor, inverse: Tensor) -> Tensor:
    return times(grad, inverse) if grad.dtype in WIDE_DTYPES else times(grad.float(), inverse).to(grad.dtype)


def _unscale_in_place(grads: Params, inverse: Any) -> None:
    wide = {name: grad for name, grad in grads.items() if grad.dtype in WIDE_DTYPES}
    if wide:
        scale_in_place(local_tensors(wide.values()), inverse)
    for grad in local_tensors(grad for name, grad in grads.items() if name not in wide):
        grad.copy_(grad.float() * inverse)
