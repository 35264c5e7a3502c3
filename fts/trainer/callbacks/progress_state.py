"""The progress of a run or an evaluation, formatted for a display."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import attrs

BAR_METRICS = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
"""Logs that are shown next to the bar -> their names there."""


@attrs.define
class ProgressState:
    """The progress of a run or an evaluation, and its latest metrics.

    Attributes:
        stage: "train" or "evaluate".
        total: steps or batches in all; None if unknown.
        initial: the step at which this run began.
        examples_per_step: examples in a step; None if unknown.
        step: steps or batches done.
        metrics: the latest values by name, as strings.
        start: `time.monotonic()` when it began.
    """

    stage: str
    total: int | None = None
    initial: int = 0
    examples_per_step: int | None = None
    step: int = 0
    metrics: dict[str, str] = attrs.field(factory=dict)
    start: float = attrs.field(factory=time.monotonic)

    def seconds(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self.start

    def rate(self) -> float | None:
        """Steps per second of this run alone; None at its begin."""
        seconds = self.seconds()
        return (self.step - self.initial) / seconds if self.step > self.initial and seconds > 0 else None

    def line(self, rate: float | None = None) -> str:
        """The progress as one line.

        Args:
            rate: steps per second; by default the mean of this run.

        >>> ProgressState("train", total=100, initial=40, examples_per_step=8, step=50).line(rate=2.0)
        'train 50/100 (50%), 16 examples/s, 0:00:00 so far, 0:00:25 left'
        """
        rate = self.rate() if rate is None else rate
        position = f"{self.stage} {self.step}" + (
            f"/{self.total} ({100 * self.step // max(self.total, 1)}%)" if self.total else ""
        )
        parts = [position, format_speed(rate, self.examples_per_step), f"{format_duration(self.seconds())} so far"]
        if rate and self.total:
            parts.append(f"{format_duration((self.total - self.step) / rate)} left")
        return ", ".join([part for part in parts if part] + [format_metrics(self.metrics)] * bool(self.metrics))


def format_speed(rate: float | None, examples_per_step: int | None) -> str:
    """The speed, in examples where their number is known.

    >>> format_speed(2.0, 8), format_speed(0.25, None), format_speed(None, 8)
    ('16 examples/s', '0.25 steps/s', '')
    """
    if not rate:
        return ""
    number = rate * (examples_per_step or 1)
    text = f"{number:.0f}" if number >= 100 else f"{number:.3g}"
    return f"{text} {'examples' if examples_per_step else 'steps'}/s"


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss.

    >>> format_duration(3725.4)
    '1:02:05'
    """
    return str(timedelta(seconds=int(seconds)))


def format_metrics(metrics: dict[str, Any]) -> str:
    """Metrics with their names.

    >>> format_metrics({"loss": "0.5", "lr": "1e-05"})
    'loss 0.5, lr 1e-05'
    """
    return ", ".join(f"{name} {value}" for name, value in metrics.items())
