"""The evaluation loop: predict every batch of a data set, gather the outputs, compute the metrics."""

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
    """An evaluation was interrupted because the run is to stop. It is no error: `except Exception` does not catch it."""


def run_evaluation(
    predict: Callable[[Any], tuple[Any, Any, Any]], batches: Iterable[Any], config: EvaluationConfig
) -> EvalLoopOutput:
    """Predict every batch, and compute the metrics.

    The loss does not depend on the batch size: it is `sum(weight * loss) / sum(weight)` over the batches.

    Args:
        predict: `(batch) -> (loss, logits, labels)`, each None where there is none, such as the Trainer's `prediction_step`.
        batches: a DataLoader or another iterable of batches; of several ranks each has its local shard.
        config: what is kept and computed.

    Returns:
        Outputs and labels in the order of the data, padded with -100; metrics; the number of examples.

    Raises:
        ArgumentError: compute_metrics returned something that is not a dictionary of numbers, or a name that is taken.
        BatchError: the outputs of batches differ in their structure.
        DataError: there is no batch.

    >>> import torch
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
    buffer, mean = DeviceBuffer(gathered.add, config.accumulation_steps), MeanLoss()
    seen, count = False, 0
    pending: EvalPrediction | None = None
    plain = isinstance(batches, DataLoader) and type(batches).__iter__ is DataLoader.__iter__
    for inputs in iterate_ignoring_signals(cast(DataLoader[Any], batches)) if plain else batches:
        # padding batches are computed, too, since a sharded model needs every rank
        found = _predict(predict, unwrap_batch(inputs), config)
        for batch in config.all_gather(None if isinstance(inputs, PaddingBatch) else found):
            if pending is not None and config.compute_metrics is not None:
                config.compute_metrics(pending, compute_result=False)
            mean.update(batch.loss, batch.weight)
            seen, count = True, count + batch.batch_size
            pending = _keep(batch, config, buffer)
    if not seen:
        raise DataError("There is no batch to evaluate. Give data that is not empty, without dropping its last batch.")
    buffer.flush()
    arrays = gathered.arrays() or {}
    metrics = mean.compute(skip_nonfinite=config.skip_nonfinite)
    metrics |= _compute_metrics(config, pending, arrays, {*metrics, *SPEED_METRICS})
    metrics = {f"{config.prefix}_{name}": value for name, value in metrics.items()}
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
    """The outputs of a batch.

    Attributes:
        batch_size: how many examples it has; 0 where that is not known.
        loss: its loss.
        weight: the denominator of `loss`.
        record: "predictions", "labels", "inputs" and "losses", as far as there are any.
    """

    batch_size: int
    loss: Tensor | None
    weight: Number
    record: dict[str, Any]


def _predict(predict: Callable[[Any], tuple[Any, Any, Any]], inputs: Any, config: EvaluationConfig) -> BatchOutput:
    size = steps.batch_size_of(inputs)
    weight = size or 1 if config.loss_weight is None else config.loss_weight(inputs)
    main = _inputs_to_keep(inputs, config)
    loss, logits, labels = predict(inputs)
    if logits is not None and config.preprocess_logits is not None:
        logits = config.preprocess_logits(logits, labels)
    loss = _check_loss(loss)
    losses = _loss_per_example(loss, size or 1) if config.include_losses else None
    found = {"predictions": logits, "labels": labels, "inputs": main, "losses": losses}
    return BatchOutput(size or 0, loss, weight, {name: value for name, value in found.items() if value is not None})


def _inputs_to_keep(inputs: Any, config: EvaluationConfig) -> Any:
    if config.main_input_name is None:
        return None
    return copy.copy(inputs) if config.batch_eval_metrics else _main_input(inputs, config.main_input_name)


def _keep(batch: BatchOutput, config: EvaluationConfig, buffer: DeviceBuffer) -> EvalPrediction | None:
    """Keep the outputs of a batch, and return what compute_metrics gets of it, if it is called by batch."""
    record = batch.record
    if config.keep:
        only = ("predictions", "labels") if config.batch_eval_metrics else tuple(record)
        buffer.add({name: value for name, value in record.items() if name in only}, batch.batch_size)
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


def _loss_per_example(loss: Tensor | None, batch_size: int) -> Tensor | None:
    """The loss of a batch for each of its examples."""
    return loss if loss is None or loss.shape == (batch_size,) else loss.mean().expand(batch_size)


def warn_missing_labels(model: nn.Module, label_names: Sequence[str], prefix: str) -> None:
    """Warn that an evaluation has no loss, and what it needs."""
    called = ", ".join(label_names) or "not named by the model's forward"
    logger.warning(
        "The evaluation set has no labels: there is no %s_loss, and compute_metrics is not called. The labels of %s are %s; "
        "add that column, or name yours by label_names=[...].",
        *(prefix, type(model).__name__, called),
    )
