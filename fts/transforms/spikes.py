"""Updates that are far larger than those before them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fts.errors import SpikeError
from fts.transforms._checks import check_count, check_number, check_transform
from fts.transforms._fast_paths import fast_apply, is_fast, pure_apply
from fts.transforms._info import merged, values_of
from fts.transforms._scalars import device_of, new_count, widest
from fts.transforms._skipping import check_unless_withheld, counted, counted_now, where, withheld_now_unless, withheld_unless
from fts.transforms.clipping import global_norm
from fts.typing import Info, OptState, Params, Transform

LEAST_SPREAD = 0.05
"""The deviation counts as at least this share of the mean: where norms hardly move, a small change is no spike."""


class Norms(NamedTuple):
    """What is known of the norms so far; 0-d tensors of the widest dtype, and a count.

    Attributes:
        mean: their running mean.
        variance: their running variance.
        seen: 0-d int64 tensor: how many there were.
    """

    mean: Tensor
    variance: Tensor
    seen: Tensor


class SpikeState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
        inner: the state of the inner transform.
        norms: what is known of the norms of gradients that made no spike.
        total: 0-d int64 tensor: how many updates were skipped.
        in_a_row: 0-d int64 tensor: how many were skipped since the last one that was not.
    """

    inner: OptState
    norms: Norms
    total: Tensor
    in_a_row: Tensor


def skip_spikes(
    inner: Transform, threshold: float = 6.0, *, decay: float = 0.99, warmup_steps: int = 50, limit: int = 10
) -> Transform:
    """Skip an update where the norm of the gradients is far above what it was: the mark of a spike in the loss.

    A norm is a spike if it exceeds `mean + threshold * max(deviation, 0.05 * mean)`, or is not finite. Mean and deviation run
    over the norms that were none: in update n each new norm has the weight `max(1 - decay, 1 / n)`. Where it is one, the updates
    are zero, and mean, deviation and the state of `inner` stay as they were.

    Args:
        inner: the transform of the other gradients.
        threshold: how many standard deviations above the mean begin a spike.
        decay: of mean and deviation, in [0, 1).
        warmup_steps: no finite norm is a spike before so many were seen.
        limit: this many skipped updates in a row are an error. With 1 the first spike is, for `loops.with_rollback`.

    Returns:
        A transform with `SpikeState`. Next to what `inner` reports, it reports `spike` (0 or 1), `spikes_total` and
        `spikes_in_a_row`.

    Raises:
        ArgumentError: `inner` is no transform, or a number is out of its range.
        SpikeError: (from `check`) the limit is reached.

    >>> from fts import transforms as tx
    >>> steady = tx.skip_spikes(tx.sgd(0.1), warmup_steps=2)
    >>> params = {"w": torch.tensor([1.0])}
    >>> state = steady.init(params)
    >>> for size in (1.0, 1.1, 50.0):
    ...     updates, state, info = steady.update({"w": torch.tensor([size])}, state, params)
    >>> updates["w"], info["spike"]
    (tensor([0.]), tensor(1))

    Source: Chowdhery et al. 2022, "PaLM", section 5.1, for skipping batches at spikes; Finch 2009, "Incremental calculation of
    weighted mean and variance", for the running mean and variance.
    """
    check_transform("skip_spikes", inner)
    check_number("skip_spikes: threshold", threshold, open_low=True)
    check_number("skip_spikes: decay", decay, high=1.0)
    check_count("skip_spikes: warmup_steps", warmup_steps, low=1)
    check_count("skip_spikes: limit", limit, low=1)

    def init(params: Params) -> OptState:
        device = device_of(params)
        mean, variance = (torch.zeros((), dtype=widest(device), device=device) for _ in range(2))
        return SpikeState(inner.init(params), Norms(mean, variance, new_count(params)), new_count(params), new_count(params))

    def judged(grads: Params, norms: Norms) -> tuple[Tensor, Norms]:
        """Whether the gradients are no spike, and the norms with theirs."""
        norm = global_norm(grads).to(norms.mean)
        deviation = torch.maximum(norms.variance.sqrt(), LEAST_SPREAD * norms.mean)
        good = norm.isfinite() & ((norm <= norms.mean + threshold * deviation) | (norms.seen < warmup_steps))
        seen = norms.seen + 1
        weight = (1.0 / seen.to(norm.dtype)).clamp(min=1.0 - decay)
        gap = norm - norms.mean
        return good, Norms(norms.mean + weight * gap, (1.0 - weight) * (norms.variance + weight * gap.square()), seen)

    def update(grads: Params, state: SpikeState, params: Params | None) -> tuple[Params, OptState, Info]:
        good, norms = judged(grads, state.norms)
        updates, inner_state, info = withheld_unless(good, inner, grads, state.inner, params)
        spike, total, in_a_row = counted(good, state.total, state.in_a_row)
        state = SpikeState(inner_state, where(good, norms, state.norms), total, in_a_row)
        return updates, state, merged([info, _report(spike, total, in_a_row)])

    def check(info: Info) -> None:
        check_unless_withheld(inner, info, "spike")
        for key, value in values_of(info, "spikes_in_a_row"):
            if int(value) >= limit:
                total = info.get(key.replace("spikes_in_a_row", "spikes_total"))
                raise SpikeError(
                    f"The norm of the gradients was far above its running mean (threshold {threshold:g}) in {int(value)} updates "
                    f"in a row (limit {limit}{'' if total is None else f', {int(total)} in all'}). Those updates were skipped. "
                    "Look at the batches, lower the learning rate, or raise skip_spikes' threshold or limit where the level of "
                    "the norms has changed for good."
                )

    label = f"skip_spikes(threshold={threshold:g}, limit={limit})"
    this = Transform(init, update, check=check, label=label, children=(inner,))
    inner_apply, slow_apply = fast_apply(inner), pure_apply(this)

    def apply(grads: Params, state: SpikeState, params: Params) -> tuple[Params, OptState, Info]:
        if not state.total.is_cpu:
            return slow_apply(grads, state, params)
        good, norms = judged(grads, state.norms)
        params, inner_state, info = withheld_now_unless(bool(good), inner, inner_apply, grads, state.inner, params)
        report = _report(*counted_now(bool(good), state.total, state.in_a_row))
        norms = norms if bool(good) else state.norms
        return params, SpikeState(inner_state, norms, state.total, state.in_a_row), merged([info, report])

    return this._replace(apply=apply if is_fast(inner) else None)


def _report(spike: Tensor, total: Tensor, in_a_row: Tensor) -> Info:
    return {"spike": spike, "spikes_total": total, "spikes_in_a_row": in_a_row}
