"""Means over micro-batches: sum(w_i * x_i) / sum(w_i) for losses, metrics and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fts.errors import LossError
from fts.steps.collectives import Collectives
from fts.steps.microbatches import batch_size_of
from fts.steps.tracing import in_transform
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
        return (batch_size_of(batch) or 1) if weigh_rows else 1
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


def total_of(outputs: Sequence[LossOutput], *, single: bool) -> Total:
    """Weighted means of losses and metrics over micro-batches; the weight of a single one cancels.

    Raises:
        LossError: no micro-batch has any weight.
    """
    weight: Number = sum(map(_weight, outputs))
    if not isinstance(weight, Tensor) and weight == 0 and not single:
        raise LossError("Every micro-batch has weight 0, so their mean loss is not defined. Does the batch have any labels?")
    if single:
        loss, _, metrics = outputs[0]
        return Total(loss, weight, {name: _mean(value, loss) for name, value in metrics.items()}, None)
    loss = sum(times(output.loss, _weight(output)) for output in outputs) / weight
    metrics = {name: torch.as_tensor(total / items) for name, (total, items) in _sums(outputs).items()}
    return Total(loss, weight, metrics, weight)


def total_among(outputs: Sequence[LossOutput], among: Collectives, device: torch.device) -> Total:
    """Weighted means over the micro-batches of all processes, by one sum of a few numbers over these.

    Args:
        outputs: of this process, with their weights; each process has metrics of the same names.
        among: the processes.
        device: where the sum is taken.

    Returns:
        The means. `divisor` is what the mean over processes of `sum(w * g)` is to be divided by; None where a single
        micro-batch's loss was multiplied by it before.

    Raises:
        LossError: no micro-batch of any process has any weight.
    """
    total = total_of_sums(among.sum(sums_of(outputs, device)), outputs, among.size)
    return total if len(outputs) > 1 else total._replace(divisor=None)


def sums_of(outputs: Sequence[LossOutput], device: torch.device) -> Tensor:
    """What is added up over processes: weights, losses, and for each metric its items and its sum over them."""
    loss = sum(times(output.loss, _weight(output)) for output in outputs)
    metrics = [part for total, items in _sums(outputs).values() for part in (items, total)]
    return _vector([sum(map(_weight, outputs)), loss, *metrics], device)


def total_of_sums(sums: Tensor, outputs: Sequence[LossOutput], size: int) -> Total:
    """The means that the sums over all processes give; see `total_among`.

    Args:
        sums: of `sums_of`, added up.
        outputs: of this process, for the names and the dtype.
        size: how many processes there are.
    """
    weight: Number = sums[0]
    if sums.is_cpu and not in_transform():
        weight = float(weight)
        if weight == 0:
            raise LossError(f"Every micro-batch of all {size} processes has weight 0, so their mean loss is not defined.")
    mean, *means = (sums[1::2] / sums[::2]).to(outputs[0].loss.dtype).unbind()
    return Total(mean, weight, dict(zip(_sums(outputs), means, strict=True)), weight / size)


def _vector(parts: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers and 0-d tensors as one tensor, wide enough for counts of tokens."""
    if device.type == "cpu" and not in_transform():
        return torch.tensor([float(part) for part in parts], dtype=torch.float64)  # a third of the time of a stack
    wide = torch.float64 if device.type != "mps" else torch.float32
    return torch.stack([torch.as_tensor(part, dtype=wide, device=device) for part in parts])


def _sums(outputs: Sequence[LossOutput]) -> dict[str, tuple[Any, Any]]:
    """For each metric its sum over items, and how many these are."""
    sums: dict[str, Any] = {}
    for output in outputs:
        for name, value in output.metrics.items():
            mean, items = value if isinstance(value, tuple) else (value, _weight(output))
            total, count = sums.get(name, (0, 0))
            sums[name] = (total + times(_detached(mean), items), count + items)
    return sums


def _weight(output: LossOutput) -> Number:
    assert output.weight is not None
    return output.weight


def _mean(value: Any, like: Tensor) -> Tensor:
    mean = _detached(value[0] if isinstance(value, tuple) else value)
    return mean if isinstance(mean, Tensor) else torch.full((), float(mean), device=like.device)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
