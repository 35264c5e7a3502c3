"""The metrics of training between two logs, and over the run."""

from __future__ import annotations

import math
from typing import Any

import attrs

from fts.loops import Logged

COUNTED = {"skipped_total": ("skipped", "skipped_in_a_row"), "spikes_total": ("spike", "spikes_in_a_row")}
"""Counters of updates that transforms skip -> metrics that a log leaves out in favour of the total."""


@attrs.define
class RunningMetrics:
    """Sums of metrics since the last log, and of all losses; saved in checkpoints.

    Metrics are also read before a checkpoint is written, so that the next log is the same whether or not the run is interrupted
    there.

    Attributes:
        sums: the sum of each metric over the steps since the last log.
        last: the value of each metric at the last step.
        steps: the number of steps since the last log.
        total_loss: the sum of all steps' losses.
        read_at: the step up to which metrics were read.
        left_out: for each metric the steps since the last log that `sums` leaves out because their mean was not finite.
        without_loss: the steps that `total_loss` leaves out for the same reason.
    """

    sums: dict[str, float] = attrs.field(factory=dict)
    last: dict[str, float] = attrs.field(factory=dict)
    steps: int = 0
    total_loss: float = 0.0
    read_at: int = 0
    left_out: dict[str, int] = attrs.field(factory=dict)
    without_loss: int = 0

    def update(self, event: Logged, *, skip_nonfinite: bool = False) -> None:
        """Add metrics that the loop has read; with `skip_nonfinite`, means that are not finite are left out."""
        for name, mean in event.metrics.items():
            counted = math.isfinite(mean) or not skip_nonfinite
            self.sums[name] = self.sums.get(name, 0.0) + (mean * event.steps if counted else 0.0)
            if not counted:
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
        """The metrics to log: means since the last log; learning rate, gradient norm and loss scale of the last step."""
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
        """JSON values, from which `RunningMetrics(**values)` restores it."""
        return attrs.asdict(self)
