"""The figures of training between two logs, and over the whole run."""

from __future__ import annotations

from typing import Any

import attrs

from fts.loops import Logged


@attrs.define
class Tally:
    """Sums of what the loop has read but nobody has logged yet, and of all losses; checkpoints keep it.

    The loop's figures are also read before a checkpoint is written, so that the log after it is the same whether the run was
    interrupted there or not.

    Attributes:
        sums: of each metric, over the steps since the last log.
        last: each metric at the last step.
        steps: since the last log.
        total_loss: the sum of all steps' losses.
        read_at: the step up to which figures were read.
    """

    sums: dict[str, float] = attrs.field(factory=dict)
    last: dict[str, float] = attrs.field(factory=dict)
    steps: int = 0
    total_loss: float = 0.0
    read_at: int = 0

    def add(self, event: Logged) -> None:
        """Take in what the loop has read."""
        for name, mean in event.metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean * event.steps
        self.total_loss += event.metrics.get("loss", 0.0) * event.steps
        self.last = dict(event.last)
        self.steps += event.steps
        self.read_at = event.counters.step

    def take(self) -> dict[str, float]:
        """What to log: means over the steps since the last log; learning rate and gradient norm of the last step."""
        means = {name: total / self.steps for name, total in self.sums.items()}
        logs = {"loss": means.pop("loss")} if "loss" in means else {}
        for source, name in (("grad_norm", "grad_norm"), ("lr", "learning_rate")):
            means.pop(source, None)
            if source in self.last:
                logs[name] = self.last[source]
        self.sums, self.steps = {}, 0
        return logs | means

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `Tally(**values)` makes the same again."""
        return attrs.asdict(self)
