"""Evaluation and prediction: a model over a data set, its outputs in arrays."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import attrs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fts import steps
from fts.errors import BatchError, DataError, LossError
from fts.loops.shards import unwrap_batch
from fts.loops.worker_signals import iterate_ignoring_signals
from fts.steps import PaddingBatch
from fts.trainer.evaluation.arrays import ArrayAllocator
from fts.trainer.evaluation.config import EvaluationConfig, dataset_length
from fts.trainer.evaluation.mean_loss import MeanLoss
from fts.trainer.evaluation.metrics import SPEED_METRICS, parse_metrics
from fts.trainer.evaluation.output_containers import BatchedOutputs, ConcatenatedOutputs, DeviceBuffer
from fts.trainer.evaluation.outputs import EvalLoopOutput, EvalPrediction
from fts.typing import Number

logger = logging.getLogger(__name__)


class EvaluationInterrupted(BaseException):
    """An evaluation was left in the middle, as the run was asked to stop. It is no error: `except Exception` lets it pass."""


def run_evaluation(
    predict: Callable[[Any], tuple[Any, Any, Any]], batches: Iterable[Any], config: EvaluationConfig
) -> EvalLoopOutput:
    """Predict every batch, and tell what came out.

    The loss is the mean over all items, whatever the batch size: `sum(weight * loss) / sum(weight)` over the batches.

    Args:
        predict: `(batch) -> (loss, logits, labels)`, each of them None where there is none, such as a Trainer's prediction_step.
        batches: a DataLoader, or anything that gives batches. Several processes give each its own of a shared source.
        config: what is kept and computed.

    Returns:
        Outputs and labels by row, in the order of the data and padded with -100; figures; the number of rows.

    Raises:
        ArgumentError: compute_metrics returned something that is not a dictionary of numbers, or a name that is taken.
        BatchError: batches differ in what they give.
        DataError: there is no batch.

    >>> predict = lambda batch: (batch.mean(), 2 * batch, batch)
    >>> output = run_evaluation(predict, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])], EvaluationConfig())
    >>> output.metrics, output.predictions.tolist(), output.num_samples
    ({'eval_loss': 3.0}, [2.0, 4.0, 12.0], 3)
    """
    total = config.total if config.total is not None else dataset_length(batches)
    gathered = (
        ConcatenatedOutputs(total, ArrayAllocator(config.memory_limit, config.directory))
        if config.concat_batches
        else BatchedOutputs()
    )
    held, mean = DeviceBuffer(gathered.add, config.accumulation_steps), MeanLoss()
    seen, count = False, 0
    waiting: EvalPrediction | None = None
    plain = isinstance(batches, DataLoader) and type(batches).__iter__ is DataLoader.__iter__
    for inputs in iterate_ignoring_signals(cast(DataLoader[Any], batches)) if plain else batches:
        # one that weighs nothing is computed all the same, since a sharded model needs every process
        found = _predict(predict, unwrap_batch(inputs), config)
        for batch in config.all_gather(None if isinstance(inputs, PaddingBatch) else found):
            if waiting is not None and config.compute_metrics is not None:
                config.compute_metrics(waiting, compute_result=False)
            mean.add(batch.loss, batch.weight)
            seen, count = True, count + batch.rows
            waiting = _keep(batch, config, held)
    if not seen:
        raise DataError("There is no batch to evaluate. Give data that is not empty, without dropping its last batch.")
    held.flush()
    arrays = gathered.arrays() or {}
    figures = mean.figures(skip_nonfinite=config.skip_nonfinite)
    figures |= _compute_metrics(config, waiting, arrays, {*figures, *SPEED_METRICS})
    metrics = {f"{config.prefix}_{name}": value for name, value in figures.items()}
    return EvalLoopOutput(arrays.get("predictions"), arrays.get("labels"), metrics, count)


def _compute_metrics(
    config: EvaluationConfig, last: EvalPrediction | None, arrays: dict[str, Any], taken: set[str]
) -> dict[str, Any]:
    if config.compute_metrics is None:
        return {}
    if config.batch_eval_metrics:
        return {} if last is None else parse_metrics(config.compute_metrics(last, compute_result=True), config.prefix, taken)
    if arrays.get("predictions") is None or arrays.get("labels") is None:
        return {}
    return parse_metrics(config.compute_metrics(_eval_prediction(arrays)), config.prefix, taken)


@attrs.frozen
class BatchOutput:
    """What a batch gave.

    Attributes:
        rows: how many it has; 0 where that cannot be told.
        loss: its loss, and over how many items that is a mean.
        weight: see `loss`.
        record: "predictions", "labels", "inputs" and "losses", as far as there are any.
    """

    rows: int
    loss: Tensor | None
    weight: Number
    record: dict[str, Any]


def _predict(predict: Callable[[Any], tuple[Any, Any, Any]], inputs: Any, config: EvaluationConfig) -> BatchOutput:
    rows = steps.batch_size_of(inputs)
    weight = rows or 1 if config.loss_weight is None else config.loss_weight(inputs)
    main = (
        None
        if config.main_input_name is None
        else copy.copy(inputs)
        if config.batch_eval_metrics
        else _main_input(inputs, config.main_input_name)
    )
    loss, logits, labels = predict(inputs)
    if logits is not None and config.preprocess_logits is not None:
        logits = config.preprocess_logits(logits, labels)
    loss = _check_loss(loss)
    losses = _loss_per_example(loss, rows or 1) if config.include_losses else None
    found = {"predictions": logits, "labels": labels, "inputs": main, "losses": losses}
    return BatchOutput(rows or 0, loss, weight, {name: value for name, value in found.items() if value is not None})


def _keep(batch: BatchOutput, config: EvaluationConfig, held: DeviceBuffer) -> EvalPrediction | None:
    """Keep what a batch gave for the result; what compute_metrics is to be given of it."""
    record = batch.record
    if config.keep:
        only = ("predictions", "labels") if config.batch_eval_metrics else tuple(record)
        held.add({name: value for name, value in record.items() if name in only}, batch.rows)
    config.on_batch()
    by_batch = config.batch_eval_metrics and config.compute_metrics is not None and {"predictions", "labels"} <= record.keys()
    return _eval_prediction(record) if by_batch else None


def _eval_prediction(parts: Mapping[str, Any]) -> EvalPrediction:
    return EvalPrediction(parts["predictions"], parts["labels"], parts.get("inputs"), parts.get("losses"))


def _main_input(inputs: Any, name: str) -> Any:
    if not isinstance(inputs, Mapping) or name not in inputs:
        keys = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise BatchError(
            f'include_for_metrics=["inputs"] needs batch[{name!r}], but the batch has {keys}. Name the key of the inputs by an '
            "attribute main_input_name of the model."
        )
    return inputs[name]


def _check_loss(loss: Any) -> Tensor | None:
    if loss is None or isinstance(loss, Tensor):
        return loss if loss is None else loss.detach()
    raise LossError(f"prediction_step returned {type(loss).__name__} as the loss; it must be a tensor, or None.")


def _loss_per_example(loss: Tensor | None, rows: int) -> Tensor | None:
    """The loss of a batch for each of its rows."""
    return loss if loss is None or loss.shape == (rows,) else loss.mean().expand(rows)


def warn_missing_labels(model: nn.Module, label_names: Sequence[str], prefix: str) -> None:
    """Say that an evaluation gave no loss, and what it would need."""
    called = ", ".join(label_names) or "not named by the model's forward"
    logger.warning(
        "The evaluation set has no labels: there is no %s_loss, and compute_metrics is not called. The labels of %s are %s; "
        "add that column, or name yours by label_names=[...].",
        *(prefix, type(model).__name__, called),
    )
