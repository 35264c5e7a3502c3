"""Figures over a whole data set that do not depend on how it is cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fts.errors import ArgumentError, BatchError, DataError
from fts.loops.cadence import Counters
from fts.loops.events import EvalBatch, Evaluated, Event
from fts.loops.source import Source
from fts.loops.source_factory import source
from fts.steps.microbatches import PaddingBatch

if TYPE_CHECKING:
    from fts.distributed.process_group import Group


Totals: TypeAlias = dict[str, tuple[Tensor | float, Tensor | float]]
"""Sum of mean times weight, and of weights, by name."""


def evaluate(
    step: Callable[[Any, Any], Mapping[str, Any]],
    state: Any,
    data: Any,
    *,
    counters: Counters | None = None,
    group: Group | None = None,
) -> Iterator[Event]:
    """Run an evaluation step over data and tell what happens; the last event is `Evaluated`.

    Sums of mean times weight, and of the weights, stay on the device in float64 and are read once, at the end.

    Args:
        step: `(state, batch) -> {name: (mean, weight)}`, such as `fts.steps.eval_step` makes; a mean is a 0-d tensor or
            a number, its weight (such as the number of rows) too.
        state: is not changed.
        data: a `source`, or what `source` accepts without further arguments.
        counters: what the events carry; by default the state's step.
        group: the ranks among which the source is sharded (`shard_source`). Each runs its batches, and all get the metrics of one
            process, bit for bit: what each batch gave is added up in the order of the data, and `PaddingBatch` ones are not.

    Returns:
        An iterator of `EvalBatch` events with `Evaluated` as the last.

    Raises:
        ArgumentError: the source is not shared among the processes of the group.
        BatchError: the step returned something that is not (mean, weight).
        DataError: there is no batch.

    >>> step = lambda state, batch: {"mean": (batch.mean(), len(batch))}
    >>> *_, last = evaluate(step, None, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    >>> last.metrics
    {'mean': 3.0}
    """
    batches = data if isinstance(data, Source) else source(data)
    at = Counters(int(getattr(state, "step", 0))) if counters is None else counters
    if group is not None and group.size != batches.part.size:
        raise ArgumentError(
            f"evaluate was given a group of {group.size} processes, and data that {batches.part.size} share. Give "
            "loops.shard_source(source, group.rank, group.size)."
        )
    return _evaluate(step, state, batches, at, group)


def _evaluate(
    step: Callable[[Any, Any], Mapping[str, Any]], state: Any, data: Source, counters: Counters, group: Group | None
) -> Iterator[Event]:
    totals: Totals = {}
    kept: list[Totals] = []
    index = -1
    for index, batch in enumerate(data.epoch(0)):
        weightless = isinstance(batch, PaddingBatch)
        metrics = step(state, batch.batch if weightless else batch)
        amounts: Totals = {name: _amount(name, value) for name, value in metrics.items()}
        if group is not None:
            kept.append({} if weightless else amounts)
        elif not weightless:
            _add(totals, amounts)
        if not weightless:
            yield EvalBatch(counters, index, data.steps_per_epoch, metrics)
    if index < 0:
        raise DataError(data.describe_empty(0))
    yield Evaluated(counters, _means(totals) if group is None else _means_of_all(kept, group))


def _add(totals: Totals, amounts: Totals) -> None:
    for name, (amount, weight) in amounts.items():
        total, count = totals.get(name, (0.0, 0.0))
        totals[name] = (amount + total, weight + count)


def _means_of_all(kept: list[Totals], group: Group) -> dict[str, float]:
    """The means over the batches of all processes, which take turns."""
    totals: Totals = {}
    for batches in zip(*group.all_gather_object(_read(kept)), strict=True):
        for amounts in batches:
            _add(totals, amounts)
    return _means({name: (torch.tensor(total, dtype=torch.float64), weight) for name, (total, weight) in totals.items()})


def _read(kept: list[Totals]) -> list[Totals]:
    """The same as Python numbers, read from the device at once."""
    flat = [torch.as_tensor(number, dtype=torch.float64) for batch in kept for pair in batch.values() for number in pair]
    numbers = iter(torch.stack([number.to(flat[0].device) for number in flat]).tolist() if flat else ())
    return [{name: (next(numbers), next(numbers)) for name in batch} for batch in kept]


def _amount(name: str, value: Any) -> tuple[Tensor | float, Tensor | float]:
    """Mean times weight, and the weight."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise BatchError(
            f"The evaluation step returned {type(value).__name__} for {name!r}; it must be a pair (mean, weight), "
            "where the weight says over how many items the mean runs."
        )
    mean, weight = _wide(value[0]), value[1]
    if mean.ndim != 0:
        raise BatchError(f"The evaluation step returned a mean of shape {list(mean.shape)} for {name!r}; it must be 0-d.")
    if isinstance(weight, Tensor):
        weight = _wide(weight)
        amount = torch.where(weight == 0, 0.0, mean * weight)  # the mean of no items is NaN, but adds nothing
    else:
        amount = mean * weight if weight else torch.zeros_like(mean)
    return amount, weight


def _wide(value: Any) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    return tensor if tensor.device.type == "mps" else tensor.double()  # MPS has no float64


def _means(totals: Totals) -> dict[str, float]:
    # an item count of 0 gives NaN, which no reader can mistake for a figure
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, (amount, weight) in totals.items():
        total = torch.as_tensor(amount)
        by_device.setdefault(total.device, {})[name] = total / weight
    read: dict[str, float] = {}
    for means in by_device.values():
        read |= dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
    return {name: read[name] for name in totals}
