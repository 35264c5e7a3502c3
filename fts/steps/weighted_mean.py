"""Weighted means over micro-batches: sum(w_i * x_i) / sum(w_i), for losses, metrics and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fts.errors import LossError
from fts.steps.collectives import Collectives
from fts.steps.microbatches import batch_size_of
from fts.steps.tracing import is_tracing
from fts.typing import Batch, LossOutput, Metrics, Number


class WeightedMean(NamedTuple):
    """Means over micro-batches; `divisor` is None for a single one, whose weight cancels."""

    loss: Tensor
    weight: Number
    metrics: Metrics
    divisor: Number | None


def microbatch_weight(output: LossOutput, batch: Batch, weight_by_batch_size: bool) -> Number:
    """The weight of a micro-batch: that of the loss output; else the batch size if `weight_by_batch_size`; else 1.

    Raises:
        LossError: the weight is negative or not finite.
    """
    weight = output.weight
    if weight is None:
        return (batch_size_of(batch) or 1) if weight_by_batch_size else 1
    if isinstance(weight, Tensor):
        return weight.detach()
    return check_weight(weight)


def check_weight(weight: float) -> float:
    """Return a weight; raise LossError if it is negative or not finite."""
    if not 0 <= weight < math.inf:
        raise LossError(
            f"A loss's weight must be the number of examples that its mean is over: finite and not negative, not {weight}."
        )
    return weight


def multiply_by_weight(value: Any, weight: Number) -> Any:
    """`value * weight`, and 0 if the weight is 0, also for NaN, the mean over no examples.

    >>> multiply_by_weight(torch.tensor(torch.nan), 0), multiply_by_weight(torch.tensor(2.0), torch.tensor(3))
    (tensor(0.), tensor(6.))
    """
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, value * weight)
    if weight == 0:
        return torch.zeros_like(value) if isinstance(value, Tensor) else 0.0
    return value * weight


def weighted_mean(outputs: Sequence[LossOutput], *, single: bool) -> WeightedMean:
    """Weighted means of losses and metrics over micro-batches; the weight of a single one cancels.

    Raises:
        LossError: all weights are 0.
    """
    weight: Number = sum(map(_weight, outputs))
    if not isinstance(weight, Tensor) and weight == 0 and not single:
        raise LossError("Every micro-batch has weight 0, so their mean loss is not defined. Does the batch have any labels?")
    if single:
        loss, _, metrics = outputs[0]
        return WeightedMean(loss, weight, {name: _mean(value, loss) for name, value in metrics.items()}, None)
    loss = sum(multiply_by_weight(output.loss, _weight(output)) for output in outputs) / weight
    metrics = {name: torch.as_tensor(total / count) for name, (total, count) in _metric_sums(outputs).items()}
    return WeightedMean(loss, weight, metrics, weight)


def all_reduce_weighted_mean(outputs: Sequence[LossOutput], collectives: Collectives, device: torch.device) -> WeightedMean:
    """Weighted means over the micro-batches of all ranks, by one all-reduce of a few numbers.

    Args:
        outputs: of this rank, with their weights; all ranks have metrics of the same names.
        collectives: of the group.
        device: of the all-reduce.

    Returns:
        The means. `divisor` is that of the mean over ranks of `sum(w * g)`; None if the loss of a single micro-batch was
        divided by it before.

    Raises:
        LossError: all weights on all ranks are 0.
    """
    total = mean_from_sums(collectives.all_reduce(weighted_sums(outputs, device)), outputs, collectives.size)
    return total if len(outputs) > 1 else total._replace(divisor=None)


def weighted_sums(outputs: Sequence[LossOutput], device: torch.device) -> Tensor:
    """The sums that are all-reduced: of weights, of weighted losses, and for each metric of its weights and weighted means."""
    loss = sum(multiply_by_weight(output.loss, _weight(output)) for output in outputs)
    metrics = [part for total, count in _metric_sums(outputs).values() for part in (count, total)]
    return _vector([sum(map(_weight, outputs)), loss, *metrics], device)


def mean_from_sums(sums: Tensor, outputs: Sequence[LossOutput], size: int) -> WeightedMean:
    """The means of all-reduced sums; see `all_reduce_weighted_mean`.

    Args:
        sums: of `weighted_sums`, after the all-reduce.
        outputs: of this rank, for the names and the dtype.
        size: the world size.
    """
    weight: Number = sums[0]
    if sums.is_cpu and not is_tracing():
        weight = float(weight)
        if weight == 0:
            raise LossError(f"Every micro-batch of all {size} ranks has weight 0, so their mean loss is not defined.")
    mean, *means = (sums[1::2] / sums[::2]).to(outputs[0].loss.dtype).unbind()
    return WeightedMean(mean, weight, dict(zip(_metric_sums(outputs), means, strict=True)), weight / size)


def _vector(parts: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers and 0-d tensors as one tensor, in float64 for counts of tokens."""
    if device.type == "cpu" and not is_tracing():
        return torch.tensor([float(part) for part in parts], dtype=torch.float64)  # a third of the time of a stack
    dtype = torch.float64 if device.type != "mps" else torch.float32
    return torch.stack([torch.as_tensor(part, dtype=dtype, device=device) for part in parts])


def _metric_sums(outputs: Sequence[LossOutput]) -> dict[str, tuple[Any, Any]]:
    """For each metric the sum of weighted means, and the sum of their weights."""
    sums: dict[str, Any] = {}
    for output in outputs:
        for name, value in output.metrics.items():
            mean, own = value if isinstance(value, tuple) else (value, _weight(output))
            total, count = sums.get(name, (0, 0))
            sums[name] = (total + multiply_by_weight(_detached(mean), own), count + own)
    return sums


def _weight(output: LossOutput) -> Number:
    assert output.weight is not None
    return output.weight


def _mean(value: Any, like: Tensor) -> Tensor:
    mean = _detached(value[0] if isinstance(value, tuple) else value)
    return mean if isinstance(mean, Tensor) else torch.full((), float(mean), device=like.device)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
