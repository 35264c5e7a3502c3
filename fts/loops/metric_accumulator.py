"""The metrics of the steps since the last log, kept on the device until they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fts.typing import Metrics

MAX_PENDING_STEPS = 512
"""After so many steps without a log the metrics are read from the device anyway, to bound memory."""


class MetricAccumulator:
    """Accumulates the metrics of steps; `read` returns their means and resets.

    Args:
        check: called with the metrics of each step, as CPU tensors, when they are read from a device other than the
            CPU: there a step cannot read them itself without waiting for the device.
        skip_nonfinite: leave values that are NaN or infinite out of the means, unless all are.

    >>> accumulator = MetricAccumulator()
    >>> for loss in (1.0, 3.0):
    ...     accumulator.add({"loss": torch.tensor(loss)})
    >>> accumulator.read()
    ({'loss': 2.0}, {'loss': 3.0}, 2)
    """

    def __init__(self, check: Callable[[Metrics], None] | None = None, skip_nonfinite: bool = False) -> None:
        self.check = check
        self._skip_nonfinite = skip_nonfinite
        self._pending: list[Metrics] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, float] = {}
        self._steps = 0

    def add(self, metrics: Metrics) -> None:
        """Add one step's metrics; costs one append."""
        self._pending.append(metrics)
        if len(self._pending) >= MAX_PENDING_STEPS:
            self._read_pending()

    def read(self) -> tuple[dict[str, float], dict[str, float], int]:
        """The mean of each scalar since the last read, the last step's values, and the number of steps."""
        self._read_pending()
        means = {name: total / self._counts[name] if self._counts[name] else math.nan for name, total in self._sums.items()}
        result = means, self._last, self._steps
        self._sums, self._counts, self._last, self._steps = {}, {}, {}, 0
        return result

    def _read_pending(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        columns = _columns(pending)
        values = _numbers(columns.values())
        for name, numbers in zip(columns, values, strict=True):
            # a plain sum in order: Python floats are float64, and a NaN stays one
            counted = [number for number in numbers if math.isfinite(number)] if self._skip_nonfinite else numbers
            self._sums[name] = self._sums.get(name, 0.0) + sum(counted)
            self._counts[name] = self._counts.get(name, 0) + len(counted)
        self._steps += len(pending)
        self._last = {name: numbers[-1] for name, numbers in zip(columns, values, strict=True) if name in pending[-1]}
        if self.check is not None and any(_on_device(column[0]) for column in columns.values()):
            self._check_each(pending, dict(zip(columns, map(iter, values), strict=True)))

    def _check_each(self, pending: list[Metrics], values: dict[str, Any]) -> None:
        assert self.check is not None
        for metrics in pending:
            read = {name: torch.tensor(next(values[name]), dtype=torch.float64) for name in metrics if name in values}
            self.check({name: value.to(_dtype(metrics[name])) for name, value in read.items()})


def _columns(pending: list[Metrics]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for metrics in pending:
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
        on_device = [index for index, column in enumerate(stacked) if column.device == device]
        flat = torch.cat([stacked[index] for index in on_device]).tolist()
        start = 0
        for index in on_device:
            stop = start + stacked[index].numel()
            result[index] = flat[start:stop]
            start = stop
    return result


def _stack(column: list[Any]) -> Tensor:
    tensors = [value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64) for value in column]
    with torch.no_grad():
        stacked = torch.stack(tensors)
        return stacked if stacked.device.type == "mps" else stacked.double()  # MPS has no float64
