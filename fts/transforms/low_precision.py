"""Parameters in 16 bits, which lose updates that are small relative to them: two ways to keep these."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fts.dtensors import from_local_like, local_tensors, to_local
from fts.errors import ArgumentError
from fts.randomness import random_bits_like
from fts.transforms._checks import check_integer, check_transform, need_params
from fts.transforms._fast_paths import WIDE_DTYPES, fast_apply, is_fast
from fts.transforms._scalars import new_count
from fts.transforms.combining import apply_updates
from fts.typing import Info, OptState, Params, Transform


class MasterState(NamedTuple):
    """State of `master_weights`.

    Attributes:
        inner: the state of the inner transform.
        master: float32 copies of the parameters in 16 bits, by name.
    """

    inner: OptState
    master: Params


class RoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        inner: the state of the inner transform.
        step: 0-d int64 tensor: the number of updates so far.
    """

    inner: OptState
    step: Tensor


def master_weights(inner: Transform) -> Transform:
    """Train float32 copies of parameters in 16 bits; the parameters are the copies, rounded.

    So the parameters are those of a training in float32, rounded, but for what rounding does to the gradients. It costs 4 bytes
    for each number. What is written into the parameters from outside is lost at the next update: the copies win.

    Args:
        inner: the transform of float32 gradients and parameters; its state is in float32, too. Parameters that are in float32
            or float64 pass as they are.

    Returns:
        A transform with `MasterState`. Updates of parameters in 16 bits are in float32, so that they lead to the rounded copy
        exactly; in a chain nothing may come behind it, which would change them.

    Raises:
        ArgumentError: `inner` is no transform, or `update` gets no parameters.

    >>> from fts import transforms as tx
    >>> params = {"w": torch.tensor([256.0], dtype=torch.bfloat16)}
    >>> kept = tx.master_weights(tx.sgd(1.0))
    >>> state = kept.init(params)
    >>> for _ in range(4):  # 256.5 is no number of bfloat16
    ...     updates, state, _ = kept.update({"w": torch.tensor([-0.5], dtype=torch.bfloat16)}, state, params)
    ...     params = tx.apply_updates(params, updates)
    >>> params["w"], state.master["w"]
    (tensor([258.], dtype=torch.bfloat16), tensor([258.]))

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.1.
    """
    check_transform("master_weights", inner)

    def init(params: Params) -> OptState:
        master = {name: p.detach().float() for name, p in params.items() if p.dtype not in WIDE_DTYPES}
        return MasterState(inner.init({**params, **master}), master)

    def update(grads: Params, state: MasterState, params: Params | None) -> tuple[Params, OptState, Info]:
        weights = {**need_params(params, "master_weights"), **state.master}
        updates, inner_state, info = inner.update(_widened(grads), state.inner, weights)
        after = apply_updates({name: weights[name] for name in state.master}, updates)
        rounded = {name: _difference(w.to(grads[name].dtype), params[name]) for name, w in after.items()}  # type: ignore[index]
        return {**updates, **rounded}, MasterState(inner_state, after), info

    inner_apply = fast_apply(inner)

    def apply(grads: Params, state: MasterState, params: Params) -> tuple[Params, OptState, Info]:
        after, inner_state, info = inner_apply(_widened(grads), state.inner, {**params, **state.master})
        master = {name: after[name] for name in state.master}
        if master:
            torch._foreach_copy_(local_tensors(params[name] for name in master), local_tensors(master.values()))
        return params, MasterState(inner_state, master), info

    fast = apply if is_fast(inner) else None
    return Transform(init, update, fast, check=inner.check, label="master_weights", children=(inner,))


def stochastic_rounding(inner: Transform, seed: int = 0) -> Transform:
    """Add updates to bfloat16 parameters in float32, and round the sums up or down at random, so that none is lost on average.

    A sum between two numbers of bfloat16 becomes the upper one with a probability of its distance from the lower one: its
    expectation is the sum itself. It keeps no copies.

    Args:
        inner: the transform of float32 gradients and parameters; its state is in float32, too. Parameters that are in float32
            or float64 pass as they are.
        seed: an integer. The rounding is a function of it, of how many updates came before, and of the parameter's name.

    Returns:
        A transform with `RoundingState`. Updates of bfloat16 parameters are in float32, so that they lead to the rounded sum
        exactly; in a chain nothing may come behind it, which would change them. A derivative passes through the rounding as if
        it were none.

    Raises:
        ArgumentError: `inner` is no transform, `seed` no integer, a parameter is in float16, or `update` gets no parameters.

    >>> from fts import transforms as tx
    >>> params = {"w": torch.full((1_000,), 256.0, dtype=torch.bfloat16)}
    >>> rounding = tx.stochastic_rounding(tx.sgd(1.0))
    >>> updates, _, _ = rounding.update({"w": torch.full((1_000,), -0.5, dtype=torch.bfloat16)}, rounding.init(params), params)
    >>> updates["w"].unique(), round(updates["w"].mean().item(), 1)
    (tensor([0., 2.]), 0.5)

    Source: Gupta, Agrawal, Gopalakrishnan, Narayanan 2015, "Deep Learning with Limited Numerical Precision", section 3.
    """
    check_transform("stochastic_rounding", inner)
    check_integer("stochastic_rounding: seed", seed)

    def init(params: Params) -> OptState:
        for name, p in params.items():
            if p.dtype not in WIDE_DTYPES and p.dtype != torch.bfloat16:
                raise ArgumentError(
                    f"stochastic_rounding is for bfloat16; {name} is in {p.dtype}. Wrap the transform in master_weights instead."
                )
        return RoundingState(inner.init(_widened(params)), new_count(params))

    def rounded(name: str, sums: Tensor, step: Tensor) -> Tensor:
        part = to_local(sums)
        return from_local_like(_rounded(part, random_bits_like(sums, seed, step.to(part.device), _number_of(name))), sums)

    def update(grads: Params, state: RoundingState, params: Params | None) -> tuple[Params, OptState, Info]:
        given = need_params(params, "stochastic_rounding")
        weights = _widened(given)
        updates, inner_state, info = inner.update(_widened(grads), state.inner, weights)
        narrow = [name for name, p in given.items() if p.dtype == torch.bfloat16]
        after = {name: rounded(name, weights[name] + updates[name], state.step) for name in narrow}
        changes = {name: _difference(w, given[name]) for name, w in after.items()}
        return {**updates, **changes}, RoundingState(inner_state, state.step + 1), info

    inner_apply = fast_apply(inner)

    def apply(grads: Params, state: RoundingState, params: Params) -> tuple[Params, OptState, Info]:
        after, inner_state, info = inner_apply(_widened(grads), state.inner, _widened(params))
        for name, p in params.items():
            if p.dtype == torch.bfloat16:
                p.copy_(rounded(name, after[name], state.step))
        return params, RoundingState(inner_state, state.step.add_(1)), info

    fast = apply if is_fast(inner) else None
    return Transform(init, update, fast, check=inner.check, label=f"stochastic_rounding(seed={seed})", children=(inner,))


def _number_of(name: str) -> int:
    number = 0  # in plain Python, which a graph can be traced through
    for letter in name:
        number = (number * 1_000_003 + ord(letter)) % (2**61 - 1)
    return number


def _widened(tensors: Params) -> Params:
    return {name: t if t.dtype in WIDE_DTYPES else t.float() for name, t in tensors.items()}


def _difference(target: Tensor, start: Tensor) -> Tensor:
    """What leads from one 16-bit tensor to another; in float32, where adding it gives the target exactly."""
    return target.float() - start.float()


def _rounded(sums: Tensor, bits: Tensor) -> Tensor:
    """float32 numbers at one of their two neighbours in bfloat16, still as float32.

    The last 16 bits of a float32 are what bfloat16 lacks. Adding 16 random bits carries into the others with the probability of
    the distance from the lower neighbour.
    """
    raised = sums.detach().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    chosen = (raised & -0x10000).view(torch.float32)
    return torch.where(sums.isfinite(), sums + (chosen - sums).detach(), sums)
