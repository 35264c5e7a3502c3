"""The metrics of the steps since the last log, kept on the device until they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fts.typing import Metrics

MAX_PENDING_STEPS = 512
"""After so many steps without a log the metrics are read all the same, so that memory stays bounded."""


class MetricAccumulator:
    """Collects the metrics of steps; `read` gives their means and starts afresh.

    Args:
        check: called with the metrics of each step, as CPU tensors, when they are read from a device other than the
            CPU: there a step cannot look at them itself without waiting for the device.
        skip_nonfinite: leave values that are NaN or infinite out of the means, unless all are.

    >>> window = MetricAccumulator()
    >>> for loss in (1.0, 3.0):
    ...     window.add({"loss": torch.tensor(loss)})
    >>> window.read()
    ({'loss': 2.0}, {'loss': 3.0}, 2)
    """

    def __init__(self, check: Callable[[Metrics], None] | None = None, skip_nonfinite: bool = False) -> None:
        self.check = check
        self._skip_nonfinite = skip_nonfinite
        self._kept: list[Metrics] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, float] = {}
        self._steps = 0

    def add(self, metrics: Metrics) -> None:
        """Keep one step's metrics; costs one append."""
        self._kept.append(metrics)
        if len(self._kept) >= MAX_PENDING_STEPS:
            self._fold()

    def read(self) -> tuple[dict[str, float], dict[str, float], int]:
        """The mean of each scalar since the last read, the last step's values, and the number of steps."""
        self._fold()
        means = {name: total / self._counts[name] if self._counts[name] else math.nan for name, total in self._sums.items()}
        result = means, self._last, self._steps
        self._sums, self._counts, self._last, self._steps = {}, {}, {}, 0
        return result

    def _fold(self) -> None:
        kept, self._kept = self._kept, []
        if not kept:
            return
        columns = _columns(kept)
        values = _numbers(columns.values())
        for name, numbers in zip(columns, values, strict=True):
            # a plain sum in order: Python floats are float64, and a NaN stays one
            counted = [number for number in numbers if math.isfinite(number)] if self._skip_nonfinite else numbers
            self._sums[name] = self._sums.get(name, 0.0) + sum(counted)
            self._counts[name] = self._counts.get(name, 0) + len(counted)
        self._steps += len(kept)
        self._last = {name: numbers[-1] for name, numbers in zip(columns, values, strict=True) if name in kept[-1]}
        if self.check is not None and any(_on_device(column[0]) for column in columns.values()):
            self._check_each(kept, dict(zip(columns, map(iter, values), strict=True)))

    def _check_each(self, kept: list[Metrics], values: dict[str, Any]) -> None:
        assert self.check is not None
        for metrics in kept:
            read = {name: torch.tensor(next(values[name]), dtype=torch.float64) for name in metrics if name in values}
            self.check({name: value.to(_dtype(metrics[name])) for name, value in read.items()})


def _columns(kept: list[Metrics]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for metrics in kept:
        for name, value in metrics.items():
            if _is_scalar(value):
                columns.setdefault(name, []).append(value)
    return columns


def _is_scalar(value: Any) -> bool:
    return value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, (int, float))


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_cpu


def _dtype(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else torch.float64


def _numbers(columns: Iterable[list[Any]]) -> list[list[float]]:
    """Python floats of each column, with one transfer from each device."""
    stacked = [_stack(column) for column in columns]
    result: list[list[float]] = [[] for _ in stacked]
    for device in {column.device for column in stacked}:
        here = [index for index, column in enumerate(stacked) if column.device == device]
        flat = torch.cat([stacked[index] for index in here]).tolist()
        start = 0
        for index in here:
            stop = start + stacked[index].numel()
            result[index] = flat[start:stop]
            start = stop
    return result


def _stack(column: list[Any]) -> Tensor:
    tensors = [value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64) for value in column]
    with torch.no_grad():
        stacked = torch.stack(tensors)
        return stacked if stacked.device.type == "mps" else stacked.double()  # MPS has no float64
