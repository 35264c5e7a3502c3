"""Metrics over a data set, which do not depend on the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fts.distributed.process_group import Group
from fts.errors import ArgumentError, BatchError, DataError
from fts.loops.cadence import Counters
from fts.loops.events import EvalBatch, Evaluated, Event
from fts.loops.source import Source
from fts.loops.source_factory import source
from fts.steps.microbatches import PaddingBatch

Totals: TypeAlias = dict[str, tuple[Tensor | float, Tensor | float]]
"""The sum of mean times weight, and the sum of weights, by name."""


def evaluate(
    step: Callable[[Any, Any], Mapping[str, Any]],
    state: Any,
    data: Any,
    *,
    counters: Counters | None = None,
    group: Group | None = None,
) -> Iterator[Event]:
    """Run an evaluation step over data, as a generator of events; the last one is `Evaluated`.

    Sums of mean times weight, and of the weights, stay on the device in float64 and are read once, at the end.

    Args:
        step: `(state, batch) -> {name: (mean, weight)}`, such as `fts.steps.eval_step` makes; a mean is a 0-d tensor or
            a number, its weight (such as the number of examples) too.
        state: is not changed.
        data: a `source`, or what `source` accepts without further arguments.
        counters: of the events; by default with the state's step.
        group: the ranks over which the source is sharded (`shard_source`). Each runs its batches, and all get the metrics of one
            process, bit for bit: sums run over all batches in the order of the data, without `PaddingBatch` ones.

    Returns:
        An iterator of `EvalBatch` events with `Evaluated` as the last.

    Raises:
        ArgumentError: the source is not sharded over the processes of the group.
        BatchError: the step returned something that is not (mean, weight).
        DataError: there is no batch.

    >>> step = lambda state, batch: {"mean": (batch.mean(), len(batch))}
    >>> *_, last = evaluate(step, None, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    >>> last.metrics
    {'mean': 3.0}
    """
    batches = data if isinstance(data, Source) else source(data)
    counters = Counters(int(getattr(state, "step", 0))) if counters is None else counters
    if group is not None and group.size != batches.shard.world_size:
        raise ArgumentError(
            f"evaluate was given a group of {group.size} processes, and data that is sharded over {batches.shard.world_size}. "
            "Give loops.shard_source(source, group.rank, group.size)."
        )
    return _evaluate(step, state, batches, counters, group)


def _evaluate(
    step: Callable[[Any, Any], Mapping[str, Any]], state: Any, data: Source, counters: Counters, group: Group | None
) -> Iterator[Event]:
    totals: Totals = {}
    per_batch: list[Totals] = []
    index = -1
    for index, batch in enumerate(data.epoch(0)):
        is_padding = isinstance(batch, PaddingBatch)
        metrics = step(state, batch.batch if is_padding else batch)
        weighted: Totals = {name: _weighted(name, value) for name, value in metrics.items()}
        if group is not None:
            per_batch.append({} if is_padding else weighted)
        elif not is_padding:
            _add(totals, weighted)
        if not is_padding:
            yield EvalBatch(counters, index, data.steps_per_epoch, metrics)
    if index < 0:
        raise DataError(data.describe_empty(0))
    yield Evaluated(counters, _means(totals) if group is None else _means_of_all(per_batch, group))


def _add(totals: Totals, weighted: Totals) -> None:
    for name, (amount, weight) in weighted.items():
        total, count = totals.get(name, (0.0, 0.0))
        totals[name] = (amount + total, weight + count)


def _means_of_all(per_batch: list[Totals], group: Group) -> dict[str, float]:
    """The means over the batches of all processes, one process after the other."""
    totals: Totals = {}
    for batches in zip(*group.all_gather_object(_to_numbers(per_batch)), strict=True):
        for weighted in batches:
            _add(totals, weighted)
    return _means({name: (torch.tensor(total, dtype=torch.float64), weight) for name, (total, weight) in totals.items()})


def _to_numbers(per_batch: list[Totals]) -> list[Totals]:
    """The same as Python numbers, with one transfer from the device."""
    flat = [torch.as_tensor(number, dtype=torch.float64) for batch in per_batch for pair in batch.values() for number in pair]
    numbers = iter(torch.stack([number.to(flat[0].device) for number in flat]).tolist() if flat else ())
    return [{name: (next(numbers), next(numbers)) for name in batch} for batch in per_batch]


def _weighted(name: str, value: Any) -> tuple[Tensor | float, Tensor | float]:
    """Mean times weight, and the weight."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise BatchError(
            f"The evaluation step returned {type(value).__name__} for {name!r}; it must be a pair (mean, weight), "
            "where the weight is the number of examples in the mean."
        )
    mean, weight = _to_float64(value[0]), value[1]
    if mean.ndim != 0:
        raise BatchError(f"The evaluation step returned a mean of shape {list(mean.shape)} for {name!r}; it must be 0-d.")
    if isinstance(weight, Tensor):
        weight = _to_float64(weight)
        amount = torch.where(weight == 0, 0.0, mean * weight)  # the mean of no examples is NaN, but adds nothing
    else:
        amount = mean * weight if weight else torch.zeros_like(mean)
    return amount, weight


def _to_float64(value: Any) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    return tensor if tensor.device.type == "mps" else tensor.double()  # MPS has no float64


def _means(totals: Totals) -> dict[str, float]:
    # a weight of 0 gives NaN, which cannot be mistaken for a metric
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, (amount, weight) in totals.items():
        total = torch.as_tensor(amount)
        by_device.setdefault(total.device, {})[name] = total / weight
    read: dict[str, float] = {}
    for means in by_device.values():
        read |= dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
    return {name: read[name] for name in totals}
