"""What a progress display shows, as text."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import attrs

BAR_METRICS = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
"""Logs that stand beside the bar -> their names there."""


@attrs.define
class ProgressState:
    """How far a run or an evaluation is, and its latest figures.

    Attributes:
        what: "train" or "evaluate".
        total: steps or batches in all; None if that is not known.
        first: the step that this run began at.
        rows: rows in a step; None if that is not known.
        step: how many are done.
        figures: the latest by name, as text.
        start: `time.monotonic()` when it began.
    """

    what: str
    total: int | None = None
    first: int = 0
    rows: int | None = None
    step: int = 0
    figures: dict[str, str] = attrs.field(factory=dict)
    start: float = attrs.field(factory=time.monotonic)

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.start

    def rate(self) -> float | None:
        """Steps a second of this run alone; None at its beginning."""
        seconds = self.seconds()
        return (self.step - self.first) / seconds if self.step > self.first and seconds > 0 else None

    def line(self, rate: float | None = None) -> str:
        """All of it on one line.

        Args:
            rate: steps a second; by default the mean of this run.

        >>> ProgressState("train", total=100, first=40, rows=8, step=50).line(rate=2.0)
        'train 50/100 (50%), 16 items/s, 0:00:00 so far, 0:00:25 left'
        """
        rate = self.rate() if rate is None else rate
        place = f"{self.what} {self.step}" + (f"/{self.total} ({100 * self.step // max(self.total, 1)}%)" if self.total else "")
        parts = [place, format_speed(rate, self.rows), f"{format_duration(self.seconds())} so far"]
        if rate and self.total:
            parts.append(f"{format_duration((self.total - self.step) / rate)} left")
        return ", ".join([part for part in parts if part] + [format_metrics(self.figures)] * bool(self.figures))


def format_speed(rate: float | None, rows: int | None) -> str:
    """How fast it goes: in rows where their number is known.

    >>> format_speed(2.0, 8), format_speed(0.25, None), format_speed(None, 8)
    ('16 items/s', '0.25 steps/s', '')
    """
    if not rate:
        return ""
    number = rate * (rows or 1)
    text = f"{number:.0f}" if number >= 100 else f"{number:.3g}"
    return f"{text} {'items' if rows else 'steps'}/s"


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss.

    >>> format_duration(3725.4)
    '1:02:05'
    """
    return str(timedelta(seconds=int(seconds)))


def format_metrics(figures: dict[str, Any]) -> str:
    """Figures with their names.

    >>> format_metrics({"loss": "0.5", "lr": "1e-05"})
    'loss 0.5, lr 1e-05'
    """
    return ", ".join(f"{name} {value}" for name, value in figures.items())
