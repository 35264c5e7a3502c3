"""Evaluation and prediction: a model over a data set, its outputs in arrays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from fts import loops, steps
from fts.errors import ArgumentError, LossError
from fts.loops import Source
from fts.trainer.gathering import Gathered
from fts.trainer.losses import Loss, item_count

SPEED = ("runtime", "samples_per_second", "steps_per_second")
GIVEN = ("loss", *SPEED)
"""The figures that every evaluation on labelled data has."""


@attrs.frozen(eq=False)
class EvalPrediction:
    """What `compute_metrics` is given.

    Attributes:
        predictions: the model's outputs: an array with a row per example, or a tuple of such arrays.
        label_ids: the labels, likewise.
        inputs: the inputs, if asked for.
        losses: the losses, if asked for.

    >>> predictions, labels = EvalPrediction(np.zeros(2), np.ones(2))
    >>> labels
    array([1., 1.])
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
    """What an evaluation loop found.

    Attributes:
        predictions: outputs by row, or None if they were not kept.
        label_ids: labels by row, or None.
        metrics: figures by name, with their prefix.
        num_samples: how many rows there were.
    """

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]
    num_samples: int


class PredictionOutput(NamedTuple):
    """What `Trainer.predict` returns: outputs by row, labels by row or None, figures by name."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float]


class TrainOutput(NamedTuple):
    """What `Trainer.train` returns: updates done, the mean training loss, figures by name."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@attrs.frozen
class Reading:
    """How a batch and the model's outputs are read.

    Attributes:
        loss: the loss of a batch.
        label_names: the batch's keys that are labels.
        ignore_keys: outputs that are not predictions.
        precision: None or "bf16".
        keep: whether outputs and labels are kept; otherwise the loss alone.
        preprocess_logits: `(logits, labels) -> logits`, run before they are kept.
    """

    loss: Loss
    label_names: Sequence[str]
    ignore_keys: Sequence[str] = ()
    precision: str | None = None
    keep: bool = True
    preprocess_logits: Callable[[Any, Any], Any] | None = None


def evaluation_loop(
    model: nn.Module,
    source: Source,
    reading: Reading,
    *,
    prefix: str = "eval",
    compute_metrics: Callable[[Any], Mapping[str, Any]] | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> EvalLoopOutput:
    """Run a model over data, without gradients and in eval mode.

    The loss is the mean over all rows (over all labels that are not -100 where labels are tokens), whatever the batch size.

    Args:
        model: is left as it was.
        source: batches that are dictionaries.
        reading: how to read them.
        prefix: is put before the names of the figures.
        compute_metrics: `EvalPrediction -> {name: number}`; called once, if there are labels. Arrays and tensors of one element
            count as numbers.
        on_batch: called after each batch.

    Returns:
        Outputs and labels by row, in the order of the data and padded with -100; figures; the number of rows.

    Raises:
        DataError: there is no batch.
        ArgumentError: compute_metrics returned something that is not a dictionary of numbers, or a name that is taken.
    """
    predictions, labels, seen = Gathered(source.num_items), Gathered(source.num_items), [0]

    def step(_: None, batch: Mapping[str, Any]) -> dict[str, Any]:
        with steps_context(model, reading.precision):
            found = read_batch(model, batch, reading)
        seen[0] += steps.rows(batch) or 0
        if reading.keep:
            logits = found.logits
            if reading.preprocess_logits is not None and logits is not None:
                logits = reading.preprocess_logits(logits, found.labels)
            predictions.add(logits)
            labels.add(found.labels)
        return {} if found.loss is None else {"loss": (found.loss, found.weight)}

    figures: dict[str, Any] = {}
    with in_eval_mode(model):
        for event in loops.evaluate(step, None, source):
            if isinstance(event, loops.Evaluated):
                figures.update(event.metrics)
            else:
                on_batch()
    outputs, targets = predictions.arrays(), labels.arrays()
    if compute_metrics is not None and outputs is not None and targets is not None:
        figures = own_figures(compute_metrics(EvalPrediction(outputs, targets)), prefix) | figures
    return EvalLoopOutput(outputs, targets, {f"{prefix}_{name}": value for name, value in figures.items()}, seen[0])


class Found(NamedTuple):
    """What one batch gave; `loss` is None where it has no labels."""

    loss: Tensor | None
    weight: Any
    logits: Any
    labels: Any


def read_batch(model: nn.Module, batch: Mapping[str, Any], reading: Reading) -> Found:
    """Run a model on one batch and take loss, logits and labels apart."""
    names = reading.label_names
    labelled = bool(names) and all(batch.get(name) is not None for name in names)
    if not labelled:
        return Found(None, 0, logits_of(model(**batch), reading.ignore_keys, begins_with_loss=False), None)
    labels = tuple(batch[name] for name in names)
    outputs, loss = reading.loss.forward(model, batch)
    if loss is None:
        raise LossError(
            f"The model {type(model).__name__} returned {type(outputs).__name__} without a loss for a batch with labels. "
            'Return it as "loss" or as the first of a tuple, or pass compute_loss_func=.'
        )
    weight = item_count(model, batch, names)
    logits = logits_of(outputs, reading.ignore_keys, begins_with_loss=reading.loss.fn is None)
    return Found(loss, weight, logits, labels[0] if len(labels) == 1 else labels)


def logits_of(outputs: Any, ignore_keys: Sequence[str], *, begins_with_loss: bool) -> Any:
    """The predictions among a model's outputs: all but the loss, None and what is ignored; one alone stands for itself.

    >>> logits_of({"loss": 1, "logits": 2, "cache": 3}, ["cache"], begins_with_loss=True)
    2
    """
    if isinstance(outputs, Mapping):
        shown = {name: value for name, value in outputs.items() if value is not None and name != "loss"}
        kept = tuple(value for name, value in shown.items() if name not in ignore_keys)
    elif isinstance(outputs, (tuple, list)):
        kept = tuple(outputs[1:] if begins_with_loss else outputs)
    else:
        return outputs
    return kept[0] if len(kept) == 1 else kept


@contextmanager
def steps_context(model: nn.Module, precision: str | None) -> Iterator[None]:
    """No gradients, and the precision of the run."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode until the block ends, then each as it was."""
    trained = [child for child in model.modules() if child.training]
    try:
        for child in trained:
            child.training = False
        yield
    finally:
        for child in trained:
            child.training = True


def speed_metrics(prefix: str, start: float, samples: float, count: float) -> dict[str, float]:
    """Seconds since `start`, and samples and steps a second."""
    seconds = max(time.perf_counter() - start, 1e-9)
    values = round(seconds, 4), round(samples / seconds, 3), round(count / seconds, 3)
    return {f"{prefix}_{name}": value for name, value in zip(SPEED, values, strict=True)}


def own_figures(metrics: Any, prefix: str) -> dict[str, int | float]:
    """What `compute_metrics` returned, by names without the prefix, and as Python numbers.

    Raises:
        ArgumentError: it is not a dictionary of numbers, or a name is that of another figure.

    >>> own_figures({"eval_f1": np.float32(0.5)}, "eval")
    {'f1': 0.5}
    """
    if not isinstance(metrics, Mapping):
        raise ArgumentError(
            f'compute_metrics returned {type(metrics).__name__}; it must return numbers by name, such as {{"accuracy": 0.5}}.'
        )
    figures: dict[str, int | float] = {}
    for key, value in metrics.items():
        if not isinstance(key, str):
            raise ArgumentError(f"compute_metrics returned a figure named {key!r}; use a string, such as {str(key)!r}.")
        name, number = key.removeprefix(f"{prefix}_"), plain(value)
        if name in GIVEN or name in figures:
            raise ArgumentError(f"compute_metrics returned {key!r}, but there is another {prefix}_{name} already. Rename it.")
        if not isinstance(number, (int, float)):
            raise ArgumentError(
                f"compute_metrics returned {type(value).__name__} for {key!r}; it must be a number. Reduce it, as with .mean(), "
                "or return its parts under names of their own."
            )
        figures[name] = number
    return figures


def plain(value: Any) -> Any:
    """A number that JSON can hold, of numpy's and torch's; everything else as it is.

    >>> plain(np.float32(0.5)), plain(torch.tensor(2)), plain("x")
    (0.5, 2, 'x')
    """
    one = (isinstance(value, Tensor) and value.numel() == 1) or (isinstance(value, (np.generic, np.ndarray)) and value.size == 1)
    return value.item() if one else value


def batches_of(samples: int, size: int) -> int:
    """How many batches hold so many rows."""
    return math.ceil(samples / size)
