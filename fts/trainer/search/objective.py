"""The objectives of a search: numbers computed from the metrics of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from fts.distributed.error_propagation import broadcast_from_main
from fts.distributed.process_group import SINGLE_PROCESS, Group
from fts.errors import ArgumentError

Objective: TypeAlias = float | list[float]
"""The number that a search minimizes or maximizes, or several."""

_SPEED_SUFFIXES = ("_runtime", "_per_second")
_COUNTERS = ("epoch", "num_input_tokens_seen")


def default_compute_objective(metrics: Mapping[str, float]) -> float:
    """The evaluation's loss if it has no other metric, else the sum of all others.

    Times, speeds, memory and counters are left out.

    Args:
        metrics: what `Trainer.evaluate` returned.

    Raises:
        ArgumentError: there is neither a loss nor another metric.

    >>> default_compute_objective({"eval_loss": 0.5, "eval_runtime": 2.0, "epoch": 1.0})
    0.5
    >>> default_compute_objective({"eval_loss": 0.5, "eval_accuracy": 0.5, "eval_f1": 0.25})
    0.75
    """
    quality = {name: value for name, value in metrics.items() if _measures_quality(name)}
    others = {name: value for name, value in quality.items() if name != "eval_loss"}
    if not quality:
        raise ArgumentError(
            f"The evaluation has no loss and no other metric to search by, only {', '.join(metrics) or 'nothing'}. Use data "
            "with labels, or Trainer(compute_metrics=...)."
        )
    return sum(others.values()) if others else quality["eval_loss"]


def _measures_quality(name: str) -> bool:
    return name not in _COUNTERS and not name.endswith(_SPEED_SUFFIXES) and "_mem_" not in name


def check_objective(value: Any, count: int) -> Objective:
    """What `compute_objective` returned, as one number or a list of several.

    Args:
        value: numbers may be Python's, numpy's or tensors of one element.
        count: how many numbers there must be.

    Raises:
        ArgumentError: it is anything else.

    >>> check_objective(1, 1), check_objective((0.5, 2), 2)
    (1.0, [0.5, 2.0])
    """
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if several else [value]
    if len(values) != count:
        raise ArgumentError(
            f"compute_objective returned {value!r}, but the search has {count} direction{'s' if count > 1 else ''}. Return a "
            "number for each."
        )
    try:
        numbers = [float(part) for part in values]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"compute_objective returned {value!r}; it must return a number, or several in a list.") from error
    return numbers if count > 1 else numbers[0]


def is_finite(objective: Objective) -> bool:
    """Whether all numbers of an objective are finite.

    >>> is_finite([1.0, float("nan")])
    False
    """
    return all(math.isfinite(part) for part in (objective if isinstance(objective, list) else [objective]))


class TrialReporter:
    """Computes the objective of each evaluation of a trial, reports it to the search, and keeps the last one.

    Args:
        compute_objective: metrics -> objective, or several.
        count: how many numbers an objective has.
        report: `(objective, metrics, step)` -> whether to end the trial.
        group: the ranks that train the trial; the main process computes and reports, and all ranks get the decision.

    Attributes:
        objective: of the last evaluation; None before the first.

    >>> reporter = TrialReporter(lambda metrics: metrics["eval_loss"], 1, lambda objective, metrics, step: objective > 1)
    >>> reporter({"eval_loss": 2.0}, 10), reporter.objective
    (True, 2.0)
    """

    def __init__(
        self,
        compute_objective: Callable[[dict[str, float]], Any],
        count: int,
        report: Callable[..., bool],
        group: Group = SINGLE_PROCESS,
    ) -> None:
        self.compute_objective, self.count, self.report, self.group = compute_objective, count, report, group
        self.objective: Objective | None = None

    def __call__(self, metrics: Mapping[str, float], step: int) -> bool:
        """Report the metrics of an evaluation after so many updates; returns whether to end the trial."""

        def report() -> tuple[Objective, bool]:
            objective = check_objective(self.compute_objective(dict(metrics)), self.count)
            return objective, self.report(objective, metrics, step)

        self.objective, ends = broadcast_from_main(self.group, report)
        return ends
