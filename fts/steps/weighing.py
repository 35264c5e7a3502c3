"""Means over micro-batches: sum(w_i * x_i) / sum(w_i) for losses, metrics and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fts.errors import LossError
from fts.steps.microbatches import rows
from fts.typing import Batch, LossOutput, Metrics, Number


class Total(NamedTuple):
    """Means over micro-batches; `divisor` is None for a single one, whose weight cancels."""

    loss: Tensor
    weight: Number
    metrics: Metrics
    divisor: Number | None


def weight_of(output: LossOutput, batch: Batch, weigh_rows: bool) -> Number:
    """A micro-batch's weight: what the loss says, else its rows where the step itself cut the batch, else 1.

    Raises:
        LossError: the loss gave a number that is negative or not finite.
    """
    weight = output.weight
    if weight is None:
        return (rows(batch) or 1) if weigh_rows else 1
    if isinstance(weight, Tensor):
        return weight.detach()
    return checked(weight)


def checked(weight: float) -> float:
    """The weight, if it is one."""
    if not 0 <= weight < math.inf:
        raise LossError(f"A loss's weight must be how many items its mean runs over: finite and not negative, not {weight}.")
    return weight


def times(value: Any, weight: Number) -> Any:
    """`value * weight`, and 0 where the weight is 0: a mean over no items is NaN, and should count nothing.

    >>> times(torch.tensor(torch.nan), 0), times(torch.tensor(2.0), torch.tensor(3))
    (tensor(0.), tensor(6.))
    """
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, value * weight)
    if weight == 0:
        return torch.zeros_like(value) if isinstance(value, Tensor) else 0.0
    return value * weight


def total_of(outputs: Sequence[tuple[LossOutput, Number]], *, single: bool) -> Total:
    """Weighted means of losses and metrics over micro-batches; the weight of a single one cancels.

    Raises:
        LossError: no micro-batch has any weight.
    """
    weight: Number = sum(weight for _, weight in outputs)
    if not isinstance(weight, Tensor) and weight == 0 and not single:
        raise LossError("Every micro-batch has weight 0, so their mean loss is not defined. Does the batch have any labels?")
    if single:
        ((loss, _, metrics), weight) = outputs[0]
        return Total(loss, weight, {name: _mean(value, loss) for name, value in metrics.items()}, None)
    loss = sum(times(output.loss, weight) for output, weight in outputs) / weight
    sums: dict[str, Any] = {}
    for output, own in outputs:
        for name, value in output.metrics.items():
            mean, item_weight = value if isinstance(value, tuple) else (value, own)
            total, items = sums.get(name, (0, 0))
            sums[name] = (total + times(_detached(mean), item_weight), items + item_weight)
    return Total(loss, weight, {name: torch.as_tensor(total / items) for name, (total, items) in sums.items()}, weight)


def _mean(value: Any, like: Tensor) -> Tensor:
    mean = _detached(value[0] if isinstance(value, tuple) else value)
    return mean if isinstance(mean, Tensor) else torch.full((), float(mean), device=like.device)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
