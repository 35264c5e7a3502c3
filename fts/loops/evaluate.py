"""Figures over a whole data set that do not depend on how it is cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fts.errors import BatchError, DataError
from fts.loops.cadence import Counters
from fts.loops.data import Source, source
from fts.loops.events import EvalBatch, Evaluated, Event


def evaluate(
    step: Callable[[Any, Any], Mapping[str, Any]], state: Any, data: Any, *, counters: Counters | None = None
) -> Iterator[Event]:
    """Run an evaluation step over data and tell what happens; the last event is `Evaluated`.

    Sums of mean times weight, and of the weights, stay on the device in float64 and are read once, at the end.

    Args:
        step: `(state, batch) -> {name: (mean, weight)}`, such as `fts.steps.eval_step` makes; a mean is a 0-d tensor or
            a number, its weight (such as the number of rows) too.
        state: is not changed.
        data: a `source`, or what `source` accepts without further arguments.
        counters: what the events carry; by default the state's step.

    Returns:
        An iterator of `EvalBatch` events with `Evaluated` as the last.

    Raises:
        BatchError: the step returned something that is not (mean, weight).
        DataError: there is no batch.

    >>> step = lambda state, batch: {"mean": (batch.mean(), len(batch))}
    >>> *_, last = evaluate(step, None, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    >>> last.metrics
    {'mean': 3.0}
    """
    batches = data if isinstance(data, Source) else source(data)
    at = Counters(int(getattr(state, "step", 0))) if counters is None else counters
    return _evaluate(step, state, batches, at)


def _evaluate(step: Callable[[Any, Any], Mapping[str, Any]], state: Any, data: Source, counters: Counters) -> Iterator[Event]:
    totals: dict[str, tuple[Tensor, Tensor | float]] = {}
    index = -1
    for index, batch in enumerate(data.epoch(0)):
        metrics = step(state, batch)
        for name, value in metrics.items():
            _add(totals, name, value)
        yield EvalBatch(counters, index, data.steps_per_epoch, metrics)
    if index < 0:
        raise DataError(data.describe_empty(0))
    yield Evaluated(counters, _means(totals))


def _add(totals: dict[str, tuple[Tensor, Tensor | float]], name: str, value: Any) -> None:
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
    total, count = totals.get(name, (0.0, 0.0))
    totals[name] = (amount + total, weight + count)


def _wide(value: Any) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    return tensor if tensor.device.type == "mps" else tensor.double()  # MPS has no float64


def _means(totals: dict[str, tuple[Tensor, Tensor | float]]) -> dict[str, float]:
    # an item count of 0 gives NaN, which no reader can mistake for a figure
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, (total, weight) in totals.items():
        by_device.setdefault(total.device, {})[name] = total / weight
    read: dict[str, float] = {}
    for means in by_device.values():
        read |= dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
    return {name: read[name] for name in totals}
