"""Averages of the parameters over the updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.errors import ArgumentError
from fts.transforms._checks import check_number, check_transform, need_params
from fts.transforms._fast_paths import fast_apply, is_fast, scale_in_place
from fts.transforms._scalars import new_count, readable, real
from fts.transforms.combining import apply_updates
from fts.typing import Info, OptState, Params, Transform


class EmaState(NamedTuple):
    """State of `ema_params`.

    Attributes:
        inner: the state of the inner transform.
        step: 0-d int64 tensor: the number of updates so far.
        average: the averaged parameters, by name.
    """

    inner: OptState
    step: Tensor
    average: Params


def ema_params(inner: Transform, decay: float, debias: bool = False) -> Transform:
    """Keep an exponential moving average of the parameters; `averaged_params` finds it.

    Args:
        inner: all the other transforms: the average is of the parameters after its updates.
        decay: the share of the older average, in [0, 1).
        debias: start from nothing, and divide by the sum of the weights, as Adam does with its moments; otherwise
            the average starts at the first parameters.

    Returns:
        A transform with `EmaState`; its `update` needs the parameters.

    Raises:
        ArgumentError: `inner` is no transform, `decay` is outside [0, 1), or `update` gets no parameters.

    >>> from fts import transforms as tx
    >>> averaging = tx.ema_params(tx.scale(-1.0), decay=0.9)
    >>> params = {"w": torch.tensor([1.0])}
    >>> updates, state, _ = averaging.update({"w": torch.tensor([1.0])}, averaging.init(params), params)
    >>> tx.averaged_params(state)
    {'w': tensor([0.9000])}

    Source: Polyak, Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging", with exponential weights.
    """
    check_transform("ema_params", inner)
    check_number("ema_params: decay", decay, high=1.0)

    def init(params: Params) -> OptState:
        return EmaState(inner.init(params), new_count(params), {name: p.detach().clone() for name, p in params.items()})

    def update(grads: Params, state: EmaState, params: Params | None) -> tuple[Params, OptState, Info]:
        weights = need_params(params, "ema_params")
        updates, inner_state, info = inner.update(grads, state.inner, weights)
        count = state.step + 1
        share = share_of_new(count)
        latest = apply_updates(weights, updates)
        average = {name: _lerp(old, latest[name], share) for name, old in state.average.items()}
        return updates, EmaState(inner_state, count, average), info

    def share_of_new(count: Any) -> Any:
        # with the sum of the weights of t updates, 1 - decay^t, divided out at once
        return (1 - decay) / (1 - decay ** real(count)) if debias else 1 - decay

    inner_apply = fast_apply(inner)

    def apply(grads: Params, state: EmaState, params: Params) -> tuple[Params, OptState, Info]:
        params, inner_state, info = inner_apply(grads, state.inner, params)
        count = state.step.add_(1)
        share = share_of_new(readable(count))
        average, latest = local_tensors(state.average[name] for name in params), local_tensors(params.values())
        if isinstance(share, Tensor):
            moves = list(torch._foreach_sub(latest, average))
            scale_in_place(moves, share)
            torch._foreach_add_(average, moves)
        else:
            torch._foreach_lerp_(average, latest, share)
        return params, EmaState(inner_state, count, state.average), info

    words = f"ema_params({decay}{', debias' if debias else ''})"
    return Transform(init, update, apply if is_fast(inner) else None, check=inner.check, label=words, children=(inner,))


def averaged_params(opt_state: OptState) -> Params:
    """The averages that `ema_params` keeps, wherever it stands in a transform.

    Args:
        opt_state: the state of a transform that contains `ema_params`.

    Returns:
        The state's own tensors by parameter name, not copies; they are consumed with the state when it is donated.

    Raises:
        ArgumentError: there is no average in it.

    >>> from fts import transforms as tx
    >>> tx.averaged_params(tx.ema_params(tx.sgd(0.1), 0.99).init({"w": torch.tensor([1.0])}))
    {'w': tensor([1.])}
    """
    found: Params = {}
    for state in _ema_states(opt_state):
        found = {**state.average, **found}
    if not found:
        raise ArgumentError("There is no average in this state: wrap the transform in ema_params(transform, decay).")
    return found


def _ema_states(state: OptState) -> list[EmaState]:
    if isinstance(state, EmaState):
        return [state, *_ema_states(state.inner)]
    if isinstance(state, dict):
        return [found for child in state.values() for found in _ema_states(child)]
    if isinstance(state, (tuple, list)):
        return [found for child in state for found in _ema_states(child)]
    return []


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    return torch.lerp(start, end, weight.to(start.dtype) if isinstance(weight, Tensor) else weight)
