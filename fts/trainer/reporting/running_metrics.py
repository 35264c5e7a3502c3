"""The figures of training between two logs, and over the whole run."""

from __future__ import annotations

import math
from typing import Any

import attrs

from fts.loops import Logged

COUNTED = {"skipped_total": ("skipped", "skipped_in_a_row"), "spikes_total": ("spike", "spikes_in_a_row")}
"""Counts of the updates that transforms leave out: a log has the total, as it stands, and not the others."""


@attrs.define
class RunningMetrics:
    """Sums of what the loop has read but nobody has logged yet, and of all losses; checkpoints keep it.

    The loop's figures are also read before a checkpoint is written, so that the log after it is the same whether the run was
    interrupted there or not.

    Attributes:
        sums: of each metric, over the steps since the last log.
        last: each metric at the last step.
        steps: since the last log.
        total_loss: the sum of all steps' losses.
        read_at: the step up to which figures were read.
        left_out: of each metric, since the last log: steps whose mean was not finite, and is not among the sums.
        without_loss: steps whose loss is not in `total_loss`, for that reason.
    """

    sums: dict[str, float] = attrs.field(factory=dict)
    last: dict[str, float] = attrs.field(factory=dict)
    steps: int = 0
    total_loss: float = 0.0
    read_at: int = 0
    left_out: dict[str, int] = attrs.field(factory=dict)
    without_loss: int = 0

    def update(self, event: Logged, *, skip_nonfinite: bool = False) -> None:
        """Take in what the loop has read; means that are not finite only if they are not to be skipped."""
        for name, mean in event.metrics.items():
            kept = math.isfinite(mean) or not skip_nonfinite
            self.sums[name] = self.sums.get(name, 0.0) + (mean * event.steps if kept else 0.0)
            if not kept:
                self.left_out[name] = self.left_out.get(name, 0) + event.steps
        loss = event.metrics.get("loss", 0.0)
        if math.isfinite(loss) or not skip_nonfinite:
            self.total_loss += loss * event.steps
        else:
            self.without_loss += event.steps
        self.last = dict(event.last)
        self.steps += event.steps
        self.read_at = event.counters.step

    def pop_logs(self) -> dict[str, float]:
        """What to log: means over the steps since the last log; learning rate, gradient norm and loss scale of the last step."""
        counts = {name: self.steps - self.left_out.get(name, 0) for name in self.sums}
        means = {name: total / counts[name] if counts[name] else math.nan for name, total in self.sums.items()}
        logs = {"loss": means.pop("loss")} if "loss" in means else {}
        for total, others in COUNTED.items():
            if total in means and total in self.last:
                means[total] = self.last[total]
                for name in others:
                    means.pop(name, None)
        for source, name in (("grad_norm", "grad_norm"), ("lr", "learning_rate"), ("loss_scale", "loss_scale")):
            means.pop(source, None)
            if source in self.last:
                logs[name] = self.last[source]
        self.sums, self.steps, self.left_out = {}, 0, {}
        return logs | means

    def mean_loss(self, step: int) -> float:
        """The mean loss of a run up to a step; 0.0 where no step was counted."""
        return self.total_loss / max(step - self.without_loss, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `RunningMetrics(**values)` makes the same again."""
        return attrs.asdict(self)
