"""Wrappers that skip or accumulate updates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.errors import NonFiniteError
from fts.transforms._checks import check_count, check_transform
from fts.transforms._fast_paths import fast_apply, is_fast, pure_apply
from fts.transforms._info import merged, values_of
from fts.transforms._scalars import new_count
from fts.transforms._skipping import (
    all_finite,
    all_finite_now,
    check_unless_withheld,
    counted,
    counted_now,
    skip_report,
    where,
    withheld_now_unless,
    withheld_unless,
)
from fts.typing import Info, OptState, Params, Transform


class SkipState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
        inner: the state of the inner transform.
        total: 0-d int64 tensor: how many updates were skipped.
        in_a_row: 0-d int64 tensor: how many were skipped since the last one that was not.
    """

    inner: OptState
    total: Tensor
    in_a_row: Tensor


class MultiStepsState(NamedTuple):
    """State of `multi_steps`.

    Attributes:
        inner: the state of the inner transform.
        gathered: 0-d int64 tensor: how many gradients are in `sums`.
        sums: sums of gradients, by parameter name.
        info: what the inner transform reported last.
    """

    inner: OptState
    gathered: Tensor
    sums: Params
    info: Info


def skip_nonfinite(inner: Transform, limit: int = 10) -> Transform:
    """Skip an update where any number of the gradients is NaN or infinite.

    The updates are then zero and the state of `inner` stays as it was.

    Args:
        inner: the transform of finite gradients.
        limit: this many skipped updates in a row are an error.

    Returns:
        A transform with `SkipState`. Next to what `inner` reports, it reports `skipped` (0 or 1), `skipped_total` and
        `skipped_in_a_row`.

    Raises:
        ArgumentError: `inner` is no transform, or `limit` no integer of at least 1.
        NonFiniteError: (from `check`) the limit is reached.

    >>> from fts import transforms as tx
    >>> careful = tx.skip_nonfinite(tx.sgd(0.1))
    >>> params = {"w": torch.tensor([1.0])}
    >>> updates, state, info = careful.update({"w": torch.tensor([float("nan")])}, careful.init(params), params)
    >>> updates["w"], info["skipped"]
    (tensor([0.]), tensor(1))
    """
    check_transform("skip_nonfinite", inner)
    check_count("skip_nonfinite: limit", limit, low=1)

    def init(params: Params) -> OptState:
        return SkipState(inner.init(params), new_count(params), new_count(params))

    def update(grads: Params, state: SkipState, params: Params | None) -> tuple[Params, OptState, Info]:
        finite = all_finite(grads, state.total.device)
        updates, inner_state, info = withheld_unless(finite, inner, grads, state.inner, params)
        skipped, total, in_a_row = counted(finite, state.total, state.in_a_row)
        return updates, SkipState(inner_state, total, in_a_row), merged([info, skip_report(skipped, total, in_a_row)])

    def check(info: Info) -> None:
        check_unless_withheld(inner, info, "skipped")
        for key, value in values_of(info, "skipped_in_a_row"):
            if int(value) >= limit:
                total = info.get(key.replace("skipped_in_a_row", "skipped_total"))
                raise NonFiniteError(
                    f"The gradients were NaN or infinite in {int(value)} updates in a row (limit {limit}"
                    f"{'' if total is None else f', {int(total)} in all'}). The parameters are those of the last finite "
                    "update. Lower the learning rate, clip gradients (clip_by_global_norm), look for log(0), 0/0 or overflow "
                    "in the loss, or raise skip_nonfinite's limit."
                )

    this = Transform(init, update, check=check, label=f"skip_nonfinite(limit={limit})", children=(inner,))
    inner_apply, slow_apply = fast_apply(inner), pure_apply(this)

    def apply(grads: Params, state: SkipState, params: Params) -> tuple[Params, OptState, Info]:
        if not state.total.is_cpu:
            return slow_apply(grads, state, params)
        finite = all_finite_now(grads)
        params, inner_state, info = withheld_now_unless(finite, inner, inner_apply, grads, state.inner, params)
        report = skip_report(*counted_now(finite, state.total, state.in_a_row))
        return params, SkipState(inner_state, state.total, state.in_a_row), merged([info, report])

    return this._replace(apply=apply if is_fast(inner) else None)


def multi_steps(inner: Transform, every: int) -> Transform:
    """Average the gradients of `every` calls, then update once.

    The calls between return zero updates and report what `inner` reported last.

    Args:
        inner: the transform of averaged gradients.
        every: how many calls make an update.

    Returns:
        A transform with `MultiStepsState`.

    Raises:
        ArgumentError: `inner` is no transform, or `every` no integer of at least 1.

    >>> from fts import transforms as tx
    >>> patient = tx.multi_steps(tx.scale(-1.0), every=2)
    >>> params = {"w": torch.tensor([0.0])}
    >>> first, state, _ = patient.update({"w": torch.tensor([1.0])}, patient.init(params), params)
    >>> second, state, _ = patient.update({"w": torch.tensor([3.0])}, state, params)
    >>> first["w"], second["w"]
    (tensor([0.]), tensor([-2.]))
    """
    check_transform("multi_steps", inner)
    check_count("multi_steps: every", every, low=1)

    def init(params: Params) -> OptState:
        sums = {name: torch.zeros_like(p) for name, p in params.items()}
        # one update of zeros, because the calls before the first update must report the same keys as all others
        inner_state = inner.init(params)
        _, _, info = inner.update(sums, inner_state, params)
        return MultiStepsState(inner_state, new_count(params), sums, {key: v.clone() for key, v in info.items()})

    def update(grads: Params, state: MultiStepsState, params: Params | None) -> tuple[Params, OptState, Info]:
        sums = {name: state.sums[name] + g for name, g in grads.items()}
        count = state.gathered + 1
        last = count == every
        updates, inner_state, info = inner.update({name: total / every for name, total in sums.items()}, state.inner, params)
        info = where(last, info, state.info)
        next_state = MultiStepsState(
            where(last, inner_state, state.inner),
            torch.where(last, 0, count),
            {name: torch.where(last, 0.0, total) for name, total in sums.items()},
            info,
        )
        return {name: torch.where(last, u, 0.0) for name, u in updates.items()}, next_state, info

    this = Transform(init, update, check=inner.check, label=f"multi_steps(every={every})", children=(inner,))
    inner_apply, slow_apply = fast_apply(inner), pure_apply(this)

    def apply(grads: Params, state: MultiStepsState, params: Params) -> tuple[Params, OptState, Info]:
        if not state.gathered.is_cpu:
            return slow_apply(grads, state, params)
        sums = local_tensors([state.sums[name] for name in grads])
        torch._foreach_add_(sums, local_tensors(grads.values()))
        if int(state.gathered.add_(1)) == every:
            torch._foreach_div_(sums, every)
            params, inner_state, info = inner_apply(state.sums, state.inner, params)
            torch._foreach_zero_(sums)
            state.gathered.zero_()
            kept = {key: value.clone() for key, value in info.items()}
            return params, MultiStepsState(inner_state, state.gathered, state.sums, kept), info
        # copies, because the state's may be overwritten in a later step
        return params, state, {key: value.clone() for key, value in state.info.items()}

    return this._replace(apply=apply if is_fast(inner) else None)
