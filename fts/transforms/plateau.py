"""Learning rates that follow a metric: the rate is part of the optimizer's state, and an evaluation changes it.

A rule says how: `Plateau` or `Greedy`. `reduce_on_plateau` makes a transform whose rate is that of its state;
`update_on_metric` gives the state after one more value of the metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fts.errors import ArgumentError
from fts.transforms._checks import check_count, check_number, check_transform, format_value
from fts.transforms._fast_paths import fast_apply, fast_update, is_fast
from fts.transforms._scalars import as_scalar, device_of
from fts.transforms._states import states_in, with_states
from fts.typing import Info, OptState, Params, Transform


class FollowState(NamedTuple):
    """State of `reduce_on_plateau`.

    Attributes:
        inner: the state of the inner transform.
        lr: 0-d float64 tensor: the learning rate of the next update.
        memory: what the rule remembers of the metric: tensors by name.
    """

    inner: OptState
    lr: Tensor
    memory: dict[str, Tensor]


class RateRule(Protocol):
    """How a metric moves the learning rate: two pure functions of 0-d tensors."""

    def start(self, lr: Tensor) -> dict[str, Tensor]:
        """What the rule remembers before the first value of the metric."""
        ...

    def after(self, lr: Tensor, memory: dict[str, Tensor], metric: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The rate and the memory after one more value."""
        ...


@dataclass(frozen=True)
class Plateau:
    """Reduce the rate where the metric no longer improves, as `torch.optim.lr_scheduler.ReduceLROnPlateau`.

    Attributes:
        mode: "min" or "max": whether a lower or a higher metric is better.
        factor: the rate is multiplied by it, in [0, 1).
        patience: so many values in a row without improvement are tolerated.
        threshold: by how much a value must be better to count.
        threshold_mode: "rel" (a share of the best value) or "abs".
        cooldown: so many values after a reduction do not count as bad.
        min_lr: the rate is never reduced below it.
        eps: a reduction that is not greater is left out.

    Raises:
        ArgumentError: a value is none of these.

    >>> from fts import transforms as tx
    >>> rule = Plateau(patience=0, factor=0.5)
    >>> transform = reduce_on_plateau(tx.sgd, 0.1, rule)
    >>> state = transform.init({"w": torch.zeros(1)})
    >>> for loss in (1.0, 0.5, 0.7):
    ...     state = update_on_metric(state, loss, rule)
    >>> followed_rate(state).item()
    0.05
    """

    mode: str = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_rule(self, ("patience", "cooldown"))

    def start(self, lr: Tensor) -> dict[str, Tensor]:
        return {"best": as_scalar(_worst(self.mode), lr.device), **_counters(lr, "bad", "cooldown")}

    def after(self, lr: Tensor, memory: dict[str, Tensor], metric: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        better = _is_better(self, metric, memory["best"])
        cooling = memory["cooldown"] > 0
        bad = torch.where(better | cooling, 0, memory["bad"] + 1)
        due = bad > self.patience
        lower = (lr * self.factor).clamp(min=self.min_lr)
        return torch.where(due & (lr - lower > self.eps), lower, lr), {
            "best": torch.where(better, metric, memory["best"]),
            "bad": torch.where(due, 0, bad),
            "cooldown": torch.where(due, self.cooldown, memory["cooldown"] - cooling.to(torch.int64)),
        }


@dataclass(frozen=True)
class Greedy:
    """Raise the rate while the metric improves, and reduce it where it does not.

    Attributes:
        mode: "min" or "max": whether a lower or a higher metric is better.
        factor: the rate is multiplied or divided by it, in (0, 1).
        patience: more good (bad) values in a row than this raise (reduce) the rate.
        threshold: by how much a value must be better than the best to be good.
        threshold_mode: "rel" (a share of the best value) or "abs".
        cooldown: so many values after a reduction count as neither.
        warmup: so many values after a rise count as neither.
        min_lr: the rate is never reduced below it.
        max_lr: the rate is never raised above it.
        eps: a smaller change is left out.
        smooth: use the mean of the last `window_size` values instead of the last one.
        window_size: see `smooth`.
        reset_start: so many reductions at `min_lr` start all over, with the first rate.

    Raises:
        ArgumentError: a value is none of these.

    >>> from fts import transforms as tx
    >>> rule = Greedy(patience=0, factor=0.5, min_lr=0.0)
    >>> transform = reduce_on_plateau(tx.sgd, 0.1, rule)
    >>> state = update_on_metric(transform.init({"w": torch.zeros(1)}), 0.5, rule)
    >>> followed_rate(state).item()
    0.2

    Source: "GreedyLR: A Novel Adaptive Learning Rate Scheduler", arXiv 2512.14527, with the counters of transformers.
    """

    mode: str = "min"
    factor: float = 0.95
    patience: int = 10
    threshold: float = 1e-6
    threshold_mode: str = "abs"
    cooldown: int = 0
    warmup: int = 0
    min_lr: float = 1e-3
    max_lr: float = 1.0
    eps: float = 1e-8
    smooth: bool = False
    window_size: int = 50
    reset_start: int = 500

    def __post_init__(self) -> None:
        _check_rule(self, ("patience", "cooldown", "warmup", "reset_start"))
        check_number("Greedy: factor", self.factor, high=1.0, open_low=True)
        check_number("Greedy: max_lr", self.max_lr)
        check_count("Greedy: window_size", self.window_size, low=1)
        if not isinstance(self.smooth, bool):
            raise ArgumentError(f"Greedy: smooth must be True or False, not {self.smooth!r}.")

    def start(self, lr: Tensor) -> dict[str, Tensor]:
        memory = {"best": as_scalar(_worst(self.mode), lr.device), "first": lr.detach().clone()}
        memory |= _counters(lr, "bad", "good", "cooldown", "warmup")
        memory["resets_in"] = torch.full((), self.reset_start, dtype=torch.int64, device=lr.device)
        if self.smooth:
            memory |= {"window": lr.new_zeros(self.window_size), "sum": torch.zeros_like(lr), **_counters(lr, "seen")}
        return memory

    def after(self, lr: Tensor, memory: dict[str, Tensor], metric: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        memory = dict(memory)
        if self.smooth:
            metric = self._smoothed(memory, metric)
        cooling = memory["cooldown"] > 0
        warming = ~cooling & (memory["warmup"] > 0)
        counts = ~cooling & ~warming
        better = counts & _is_better(self, metric, memory["best"])
        good = torch.where(better, memory["good"] + 1, 0)
        bad = torch.where(counts & ~better, memory["bad"] + 1, 0)
        rises = good > self.patience
        falls = bad > self.patience
        higher, lower = (lr / self.factor).clamp(max=self.max_lr), (lr * self.factor).clamp(min=self.min_lr)
        rate = torch.where(rises & (higher - lr > self.eps), higher, lr)
        rate = torch.where(falls & (lr - lower > self.eps), lower, rate)
        resets_in = memory["resets_in"] - (falls & (rate <= self.min_lr)).to(torch.int64)
        resets = falls & (rate <= self.min_lr) & (resets_in <= 0)
        memory |= {
            "best": torch.where(resets, _worst(self.mode), torch.where(better, metric, memory["best"])),
            "good": torch.where(rises, 0, good),
            "bad": torch.where(falls, 0, bad),
            "warmup": torch.where(rises, self.warmup, torch.where(resets, 0, memory["warmup"] - warming.to(torch.int64))),
            "cooldown": torch.where(falls, self.cooldown, memory["cooldown"] - cooling.to(torch.int64)),
            "resets_in": torch.where(rises | resets, self.reset_start, resets_in),
        }
        for name in ("window", "sum", "seen") if self.smooth else ():
            memory[name] = torch.where(resets, torch.zeros_like(memory[name]), memory[name])
        return torch.where(resets, memory["first"], rate), memory

    def _smoothed(self, memory: dict[str, Tensor], metric: Tensor) -> Tensor:
        """The mean of the last values; `memory` gets the new one."""
        place = memory["seen"] % self.window_size
        here = torch.arange(self.window_size, device=metric.device) == place
        dropped = torch.where(here, memory["window"], 0.0).sum()
        memory["window"] = torch.where(here, metric, memory["window"])
        total = memory["sum"] + metric - dropped
        memory["sum"] = torch.where(total.isfinite(), total, memory["window"].sum())  # NaN goes when it leaves the window
        memory["seen"] = memory["seen"] + 1
        return memory["sum"] / memory["seen"].clamp(max=self.window_size)


def reduce_on_plateau(make: Callable[[Any], Transform], lr: float, rule: RateRule) -> Transform:
    """A transform whose learning rate is in its state, where `update_on_metric` changes it.

    Args:
        make: the inner transform for a learning rate, which is a number or a 0-d tensor: `tx.sgd`, or
            `lambda lr: tx.adamw(lr, weight_decay=0.1)`. The structure of its state must not depend on the rate.
        lr: the first rate.
        rule: what `update_on_metric` will be called with, such as `Plateau()`.

    Returns:
        A transform with `FollowState`. It reports what the inner one reports, so `lr` is the rate in use.

    Raises:
        ArgumentError: `lr` is negative or not finite, `make` gives no transform, or the rule is none.

    >>> from fts import transforms as tx
    >>> rule = tx.Plateau(patience=1)
    >>> transform = tx.reduce_on_plateau(tx.sgd, 0.1, rule)
    >>> params = {"w": torch.tensor([1.0])}
    >>> updates, state, info = transform.update({"w": torch.tensor([2.0])}, transform.init(params), params)
    >>> updates["w"], info["lr"].item()
    (tensor([-0.2000]), 0.1)
    """
    check_number("reduce_on_plateau: lr", lr)
    _check_is_rule("reduce_on_plateau", rule)
    if not callable(make) or isinstance(make, Transform):
        raise ArgumentError(f"reduce_on_plateau takes a function that makes a transform for a rate, as tx.sgd, not {make!r}.")
    first = make(lr)
    check_transform("reduce_on_plateau", first)
    latest: dict[float, Transform] = {}  # the rate seldom changes

    def now(rate: Tensor) -> Transform:
        if not rate.is_cpu:
            return make(rate)
        value = float(rate)  # reading it on the CPU waits for nothing
        transform = latest.get(value)
        if transform is None:
            transform = make(value)
            latest.clear()
            latest[value] = transform
        return transform

    def init(params: Params) -> OptState:
        rate = as_scalar(lr, device_of(params))
        return FollowState(first.init(params), rate, rule.start(rate))

    def update(grads: Params, state: FollowState, params: Params | None) -> tuple[Params, OptState, Info]:
        updates, inner, info = make(state.lr).update(grads, state.inner, params)
        return updates, state._replace(inner=inner), info

    def update_(grads: Params, state: FollowState, params: Params | None) -> tuple[Params, OptState, Info]:
        updates, inner, info = fast_update(now(state.lr))(grads, state.inner, params)
        return updates, state._replace(inner=inner), info

    def apply(grads: Params, state: FollowState, params: Params) -> tuple[Params, OptState, Info]:
        params, inner, info = fast_apply(now(state.lr))(grads, state.inner, params)
        return params, state._replace(inner=inner), info

    return Transform(
        init,
        update,
        apply if is_fast(first) else None,
        update_ if first.update_ else None,
        first.check,
        f"reduce_on_plateau({format_value(lr)}, {type(rule).__name__})",
        (first,),
    )


def update_on_metric(opt_state: OptState, metric: float | Tensor, rule: RateRule) -> OptState:
    """The state after one more value of the metric: `reduce_on_plateau` finds its next rate in it.

    Args:
        opt_state: the state of a transform that contains `reduce_on_plateau`, anywhere. It is not written.
        metric: a number or a 0-d tensor.
        rule: that of `reduce_on_plateau`.

    Returns:
        A new state that shares all tensors but those of the rule.

    Raises:
        ArgumentError: there is no `reduce_on_plateau` in it, the metric is no number, or the rule is none.

    >>> from fts import transforms as tx
    >>> rule = tx.Plateau(patience=0)
    >>> transform = tx.chain(tx.clip_by_global_norm(1.0), tx.reduce_on_plateau(tx.sgd, 0.1, rule))
    >>> state = tx.update_on_metric(transform.init({"w": torch.zeros(1)}), 3.0, rule)
    >>> state = tx.update_on_metric(state, 3.0, rule)
    >>> round(tx.followed_rate(state).item(), 6)
    0.01
    """
    _check_is_rule("update_on_metric", rule)
    if not isinstance(metric, Tensor):
        try:
            metric = float(metric)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"update_on_metric: the metric must be a number, not {metric!r}.") from error
    if not steps_on_metric(opt_state):
        raise ArgumentError(_NONE_HERE)

    def observed(state: FollowState) -> FollowState:
        rate, memory = rule.after(state.lr, state.memory, as_scalar(metric, state.lr.device))
        return FollowState(state.inner, rate, memory)

    return with_states(opt_state, {FollowState: observed})


def followed_rate(opt_state: OptState) -> Tensor:
    """The learning rate of the next update, where a metric decides.

    Args:
        opt_state: the state of a transform that contains `reduce_on_plateau`, anywhere.

    Returns:
        A 0-d tensor, the state's own.

    Raises:
        ArgumentError: there is no `reduce_on_plateau` in it.

    >>> from fts import transforms as tx
    >>> tx.followed_rate(tx.reduce_on_plateau(tx.sgd, 0.1, tx.Plateau()).init({"w": torch.zeros(1)})).item()
    0.1
    """
    states = states_in(opt_state, FollowState)
    if not states:
        raise ArgumentError(_NONE_HERE)
    rate: Tensor = states[0].lr
    return rate


def steps_on_metric(opt_state: OptState) -> bool:
    """Whether `followed_rate` and `update_on_metric` find something in a state.

    >>> from fts import transforms as tx
    >>> tx.steps_on_metric(tx.sgd(0.1).init({"w": torch.zeros(1)}))
    False
    """
    return bool(states_in(opt_state, FollowState))


_NONE_HERE = "No rate in this state follows a metric: make the transform with reduce_on_plateau(make, lr, rule)."


def _worst(mode: str) -> float:
    return math.inf if mode == "min" else -math.inf


def _counters(lr: Tensor, *names: str) -> dict[str, Tensor]:
    return {name: torch.zeros((), dtype=torch.int64, device=lr.device) for name in names}


def _is_better(rule: Plateau | Greedy, metric: Tensor, best: Tensor) -> Tensor:
    sign = -1.0 if rule.mode == "min" else 1.0
    bound = best * (1.0 + sign * rule.threshold) if rule.threshold_mode == "rel" else best + sign * rule.threshold
    return metric < bound if rule.mode == "min" else metric > bound


def _check_rule(rule: Plateau | Greedy, counts: tuple[str, ...]) -> None:
    where = type(rule).__name__
    check_number(f"{where}: factor", rule.factor, high=1.0)
    for name in ("threshold", "min_lr", "eps"):
        check_number(f"{where}: {name}", getattr(rule, name))
    for name in counts:
        check_count(f"{where}: {name}", getattr(rule, name))
    if rule.mode not in {"min", "max"}:
        raise ArgumentError(f"{where}: mode must be 'min' or 'max', not {rule.mode!r}.")
    if rule.threshold_mode not in {"rel", "abs"}:
        raise ArgumentError(f"{where}: threshold_mode must be 'rel' or 'abs', not {rule.threshold_mode!r}.")


def _check_is_rule(function: str, rule: Any) -> None:
    if isinstance(rule, type) or not (callable(getattr(rule, "start", None)) and callable(getattr(rule, "after", None))):
        raise ArgumentError(f"{function} takes a rule such as Plateau() or Greedy(), not {rule!r}.")
