"""What training, evaluation, prediction and a search return."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import attrs


@attrs.define(eq=False)  # not frozen: scripts replace predictions in place, as in `prediction.predictions = ...`
class EvalPrediction:
    """What `compute_metrics` is called with.

    Attributes:
        predictions: the model's outputs: an array with a row per example, or a tuple of such arrays.
        label_ids: the labels, likewise.
        inputs: the inputs, if asked for by `include_for_metrics`.
        losses: for each example the loss of its batch, if asked for.

    >>> predictions, labels = EvalPrediction([0.0, 0.5], [1, 0])
    >>> labels
    [1, 0]
    """

    predictions: Any
    label_ids: Any
    inputs: Any = None
    losses: Any = None

    def __iter__(self) -> Iterator[Any]:
        extra = [value for value in (self.inputs, self.losses) if value is not None]
        return iter([self.predictions, self.label_ids, *extra])

    def __getitem__(self, index: int) -> Any:
        return tuple(self)[index]


class EvalLoopOutput(NamedTuple):
    """What an evaluation loop returns.

    Attributes:
        predictions: outputs, an array with a row per example; None if they were not kept.
        label_ids: labels, likewise.
        metrics: by name, with their prefix.
        num_samples: how many examples there were.
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]
    num_samples: int


class PredictionOutput(NamedTuple):
    """What `Trainer.predict` returns: outputs, labels or None, and metrics by name."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


class TrainOutput(NamedTuple):
    """What `Trainer.train` returns: updates done, the mean training loss, and metrics by name."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class BestRun(NamedTuple):
    """The best run of a hyper-parameter search.

    Attributes:
        run_id: which run it is; its checkpoints are in a directory that ends in `run-{run_id}`.
        objective: its value, or several.
        hyperparameters: the values that it was trained with, by name.
        run_summary: the search as its library describes it, where it does.
    """

    run_id: str
    objective: float | list[float]
    hyperparameters: dict[str, Any]
    run_summary: Any = None
