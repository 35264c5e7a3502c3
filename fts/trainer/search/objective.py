"""What a search makes better: numbers computed of an evaluation's figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from fts.distributed.error_propagation import broadcast_from_main
from fts.distributed.process_group import ALONE, Group
from fts.errors import ArgumentError

Objective: TypeAlias = float | list[float]
"""The number that a search makes better, or several."""

_OF_THE_RUN = ("_runtime", "_per_second")
_COUNTS = ("epoch", "num_input_tokens_seen")


def default_compute_objective(metrics: Mapping[str, float]) -> float:
    """The evaluation's loss where it has no other figure, else the sum of all others.

    Times, speeds, memory and counts are left out.

    Args:
        metrics: what `Trainer.evaluate` returned.

    Raises:
        ArgumentError: there is neither a loss nor another figure.

    >>> default_compute_objective({"eval_loss": 0.5, "eval_runtime": 2.0, "epoch": 1.0})
    0.5
    >>> default_compute_objective({"eval_loss": 0.5, "eval_accuracy": 0.5, "eval_f1": 0.25})
    0.75
    """
    figures = {name: value for name, value in metrics.items() if _is_figure(name)}
    others = {name: value for name, value in figures.items() if name != "eval_loss"}
    if not figures:
        raise ArgumentError(
            f"The evaluation has no loss and no other figure to search by, but {', '.join(metrics) or 'nothing'}. Give it "
            "labels, or Trainer a compute_metrics."
        )
    return sum(others.values()) if others else figures["eval_loss"]


def _is_figure(name: str) -> bool:
    return name not in _COUNTS and not name.endswith(_OF_THE_RUN) and "_mem_" not in name


def checked_objective(value: Any, count: int) -> Objective:
    """What `compute_objective` gave, as one number or a list of several.

    Args:
        value: numbers may be Python's, numpy's or tensors of one element.
        count: how many there must be.

    Raises:
        ArgumentError: it is something else.

    >>> checked_objective(1, 1), checked_objective((0.5, 2), 2)
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
    """Whether all of an objective are numbers.

    >>> is_finite([1.0, float("nan")])
    False
    """
    return all(math.isfinite(part) for part in (objective if isinstance(objective, list) else [objective]))


class Reports:
    """Takes the figures of a trial's evaluations, tells the search of each, and keeps the last objective.

    Args:
        compute: figures -> objective, or several.
        count: how many numbers an objective has.
        tell: `(objective, figures, step)` -> whether the trial is to end.
        group: processes that train the trial together; the first one computes and tells, and all get its answer.

    Attributes:
        objective: of the last evaluation; None before the first.

    >>> reports = Reports(lambda metrics: metrics["eval_loss"], 1, lambda objective, metrics, step: objective > 1)
    >>> reports({"eval_loss": 2.0}, 10), reports.objective
    (True, 2.0)
    """

    def __init__(
        self, compute: Callable[[dict[str, float]], Any], count: int, tell: Callable[..., bool], group: Group = ALONE
    ) -> None:
        self.compute, self.count, self.tell, self.group = compute, count, tell, group
        self.objective: Objective | None = None

    def __call__(self, metrics: Mapping[str, float], step: int) -> bool:
        """Take the figures of an evaluation after so many updates."""

        def decided() -> tuple[Objective, bool]:
            objective = checked_objective(self.compute(dict(metrics)), self.count)
            return objective, self.tell(objective, metrics, step)

        self.objective, ends = broadcast_from_main(self.group, decided)
        return ends
