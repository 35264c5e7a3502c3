"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.transforms._arguments import check_number, in_words
from fts.transforms._inplace import added, fast_update, for_kernel, fused_lists, scale_in_place
from fts.transforms._masks import Mask, as_predicate, everything, mask_in_words
from fts.transforms._rates import Rate, check_rate, checking, rate_at, rate_now, report, report_now
from fts.transforms._scalars import new_count, real, times
from fts.transforms.combining import identity
from fts.transforms.scaling import add_decayed_weights
from fts.typing import Info, OptState, Params, Transform


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
    _check_moments("scale_by_adam", b1, b2, eps)

    def init(params: Params) -> OptState:
        zeros = [{name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2)]
        return AdamState(new_count(params), *zeros)

    def update(grads: Params, state: AdamState, params: Params | None) -> tuple[Params, OptState, Info]:
        count = state.step + 1
        # lerp(a, b, w) is a + w (b - a): the same mean, also to the last bit of the fused kernels
        mu = {name: torch.lerp(state.mu[name], g, 1 - b1) for name, g in grads.items()}
        nu = {name: b2 * state.nu[name] + (1 - b2) * g * g for name, g in grads.items()}
        unbias1, unbias2 = 1 / (1 - b1 ** real(count)), 1 / (1 - b2 ** real(count))
        updates = {name: times(mu[name], unbias1) / (times(nu[name], unbias2).sqrt() + eps) for name in grads}
        return updates, AdamState(count, mu, nu), {}

    def update_(grads: Params, state: AdamState, params: Params | None) -> tuple[Params, OptState, Info]:
        slopes, mu, nu = (
            local_tensors(grads.values()),
            local_tensors(state.mu[name] for name in grads),
            local_tensors(state.nu[name] for name in grads),
        )
        count = state.step.add_(1)
        torch._foreach_lerp_(mu, slopes, 1 - b1)
        torch._foreach_mul_(nu, b2)
        torch._foreach_addcmul_(nu, slopes, slopes, 1 - b2)
        step = int(count) if count.is_cpu else real(count)
        unbias1, unbias2 = 1 / (1 - b1**step), 1 / (1 - b2**step)
        roots = torch._foreach_sqrt(nu)
        scale_in_place(roots, unbias2**0.5)
        torch._foreach_add_(roots, eps)
        torch._foreach_copy_(slopes, mu)  # the gradients' memory takes the updates
        scale_in_place(slopes, unbias1)
        torch._foreach_div_(slopes, roots)
        return grads, state, {}

    return Transform(init, update, update_=update_, label=f"scale_by_adam(b1={b1}, b2={b2}, eps={eps})")


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
    check_number("adam: weight_decay", weight_decay)
    descent = _descent("adam", lr, (b1, b2, eps), weight_decay, None, torch._fused_adam_)
    decayed = f", weight_decay={in_words(weight_decay)}" if weight_decay else ""
    return descent._replace(label=f"adam(lr={in_words(lr)}{decayed})")


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
    check_number("adamw: weight_decay", weight_decay)
    descent = _descent("adamw", lr, (b1, b2, eps), weight_decay, mask, torch._fused_adamw_)
    masked = "" if mask is None else f", mask={mask_in_words(mask)}"
    return descent._replace(label=f"adamw(lr={in_words(lr)}, weight_decay={in_words(weight_decay)}{masked})")


def _descent(
    name: str, lr: Rate, betas: tuple[float, float, float], weight_decay: float, mask: Mask | None, kernel: Callable[..., None]
) -> Transform:
    """Adam's scaling with weight decay before it (adam) or after it (adamw), times minus the learning rate."""
    check_rate(f"{name}: lr", lr)
    _check_moments(name, *betas)
    b1, b2, eps = betas
    moments = scale_by_adam(b1, b2, eps)
    decay = add_decayed_weights(weight_decay, mask) if weight_decay else identity()
    decays, check_names = as_predicate(everything if mask is None else mask, name)
    decay_first = name == "adam"

    def init(params: Params) -> OptState:
        check_names(params)
        return moments.init(params)

    def update(grads: Params, state: AdamState, params: Params | None) -> tuple[Params, OptState, Info]:
        rate = rate_at(lr, state.step)
        if decay_first:
            grads, _, _ = decay.update(grads, (), params)
        updates, next_state, _ = moments.update(grads, state, params)
        if not decay_first:
            updates, _, _ = decay.update(updates, (), params)
        return {name: times(u, -rate) for name, u in updates.items()}, next_state, {"lr": report(rate, state.step.device)}

    scale_, decay_ = fast_update(moments), fast_update(decay)

    def update_(grads: Params, state: AdamState, params: Params | None) -> tuple[Params, OptState, Info]:
        rate = rate_now(lr, state.step)
        if decay_first:
            grads, _, _ = decay_(grads, (), params)
        updates, state, _ = scale_(grads, state, params)
        if not decay_first:
            updates, _, _ = decay_(updates, (), params)
        scale_in_place(updates.values(), -rate)
        return updates, state, {"lr": report_now(lr, rate, state.step.device)}

    slow_apply = added(update_)

    def apply(grads: Params, state: AdamState, params: Params) -> tuple[Params, OptState, Info]:
        lists = fused_lists(params, grads, state.mu, state.nu)
        if lists is None:
            return slow_apply(grads, state, params)
        rate = rate_now(lr, state.step)
        info = {"lr": report_now(lr, rate, state.step.device)}
        weights, slopes, mu, nu = lists
        fraction = weight_decay
        if mask is not None and weight_decay:
            # decayed beforehand, one call of the kernel serves all; a second one would cost more than this product
            decayed = [param for name, param in params.items() if decays(name, param)]
            if decayed:
                scale_in_place(decayed, 1 - rate * weight_decay)
            fraction = 0.0
        kernel(
            weights,
            slopes,
            mu,
            nu,
            [],
            [state.step.add_(1).float()] * len(weights),
            lr=for_kernel(rate),
            beta1=b1,
            beta2=b2,
            weight_decay=fraction,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return params, state, info

    return Transform(init, update, apply, update_, checking(lr))


def _check_moments(function: str, b1: float, b2: float, eps: float) -> None:
    check_number(f"{function}: b1", b1, high=1.0)
    check_number(f"{function}: b2", b2, high=1.0)
    check_number(f"{function}: eps", eps)
