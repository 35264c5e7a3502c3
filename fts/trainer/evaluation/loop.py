"""Evaluation and prediction: a model over a data set, its outputs in arrays."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fts import steps
from fts.distributed.object_collectives import alone
from fts.errors import BatchError, DataError, LossError
from fts.loops.shards import unwrapped
from fts.loops.worker_signals import sheltered
from fts.steps import PaddingBatch
from fts.steps.binding import Binding
from fts.trainer.evaluation.arrays import Space
from fts.trainer.evaluation.gathering import Gathered, Held, Listed
from fts.trainer.evaluation.metrics import SPEED, own_figures
from fts.trainer.evaluation.outputs import EvalLoopOutput, EvalPrediction
from fts.trainer.model.loss import item_count
from fts.typing import Number

logger = logging.getLogger(__name__)


@attrs.frozen
class EvaluationPlan:
    """How an evaluation goes.

    Attributes:
        prefix: is put before the figures' names.
        weigh: over how many items the mean loss of a batch runs; None: over its rows.
        compute_metrics: `EvalPrediction -> {name: number}`; called where there are predictions and labels.
        metrics_by_batch: call it for each batch, with `compute_result=True` for the last one, whose answer counts.
        keep: whether predictions and labels are kept for the result; with `metrics_by_batch` nothing else needs them.
        concatenate: join the batches to arrays with a row per example; otherwise lists with an entry per batch.
        input_name: the key of the batch that `EvalPrediction.inputs` is made of; None: no inputs. With `metrics_by_batch` it is
            the whole batch, as in transformers.
        with_losses: whether there is `EvalPrediction.losses`.
        preprocess_logits: `(logits, labels) -> logits`, run before they are kept.
        skip_nonfinite: leave losses that are NaN or infinite out of the mean, unless all are.
        hold_batches: how many batches stay on an accelerator before they are copied to the CPU; None: a bounded amount.
        on_batch: called after each batch.
        exchange: brings together what a batch gave in each process: `(this process's or None) -> those of all, in order`.
        total: how many rows there will be; None: as the data says, if it does.
        memory_limit: bytes of arrays in memory, beyond which they lie in temporary files; None: half of what is free.
        folder: where these files are; None: the system's folder for temporary files.
    """

    prefix: str = "eval"
    weigh: Callable[[Any], Number] | None = None
    compute_metrics: Callable[..., Any] | None = None
    metrics_by_batch: bool = False
    keep: bool = True
    concatenate: bool = True
    input_name: str | None = None
    with_losses: bool = False
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    skip_nonfinite: bool = False
    hold_batches: int | None = None
    on_batch: Callable[[], Any] = lambda: None
    exchange: Callable[[Any], list[Any]] = alone
    total: int | None = None
    memory_limit: int | None = None
    folder: str | Path | None = None


class EvaluationLeft(BaseException):
    """An evaluation was left in the middle, as the run was asked to stop. It is no error: `except Exception` lets it pass."""


def run_evaluation(
    predict: Callable[[Any], tuple[Any, Any, Any]], batches: Iterable[Any], *, how: EvaluationPlan
) -> EvalLoopOutput:
    """Predict every batch, and tell what came out.

    The loss is the mean over all items, whatever the batch size: `sum(weight * loss) / sum(weight)` over the batches.

    Args:
        predict: `(batch) -> (loss, logits, labels)`, each of them None where there is none, such as a Trainer's prediction_step.
        batches: a DataLoader, or anything that gives batches. Several processes give each its own of a shared source.
        how: what is kept and computed.

    Returns:
        Outputs and labels by row, in the order of the data and padded with -100; figures; the number of rows.

    Raises:
        ArgumentError: compute_metrics returned something that is not a dictionary of numbers, or a name that is taken.
        BatchError: batches differ in what they give.
        DataError: there is no batch.

    >>> predict = lambda batch: (batch.mean(), 2 * batch, batch)
    >>> output = run_evaluation(predict, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])], how=EvaluationPlan())
    >>> output.metrics, output.predictions.tolist(), output.num_samples
    ({'eval_loss': 3.0}, [2.0, 4.0, 12.0], 3)
    """
    total = how.total if how.total is not None else rows_in(batches)
    gathered = Gathered(total, Space(how.memory_limit, how.folder)) if how.concatenate else Listed()
    held, mean = Held(gathered.add, how.hold_batches), MeanLoss()
    seen, count = False, 0
    waiting: EvalPrediction | None = None
    plain = isinstance(batches, DataLoader) and type(batches).__iter__ is DataLoader.__iter__
    for inputs in sheltered(cast(DataLoader[Any], batches)) if plain else batches:
        # one that weighs nothing is computed all the same, since a sharded model needs every process
        found = _predicted(predict, unwrapped(inputs), how)
        for batch in how.exchange(None if isinstance(inputs, PaddingBatch) else found):
            if waiting is not None and how.compute_metrics is not None:
                how.compute_metrics(waiting, compute_result=False)
            mean.add(batch.loss, batch.weight)
            seen, count = True, count + batch.rows
            waiting = _kept(batch, how, held)
    if not seen:
        raise DataError("There is no batch to evaluate. Give data that is not empty, without dropping its last batch.")
    held.flush()
    arrays = gathered.arrays() or {}
    figures = mean.figures(skip_nonfinite=how.skip_nonfinite)
    figures |= _metrics(how, waiting, arrays, {*figures, *SPEED})
    metrics = {f"{how.prefix}_{name}": value for name, value in figures.items()}
    return EvalLoopOutput(arrays.get("predictions"), arrays.get("labels"), metrics, count)


def _metrics(how: EvaluationPlan, last: EvalPrediction | None, arrays: dict[str, Any], taken: set[str]) -> dict[str, Any]:
    if how.compute_metrics is None:
        return {}
    if how.metrics_by_batch:
        return {} if last is None else own_figures(how.compute_metrics(last, compute_result=True), how.prefix, taken)
    if arrays.get("predictions") is None or arrays.get("labels") is None:
        return {}
    return own_figures(how.compute_metrics(_prediction(arrays)), how.prefix, taken)


@attrs.frozen
class Predicted:
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


def _predicted(predict: Callable[[Any], tuple[Any, Any, Any]], inputs: Any, how: EvaluationPlan) -> Predicted:
    rows = steps.batch_size_of(inputs)
    weight = rows or 1 if how.weigh is None else how.weigh(inputs)
    main = None if how.input_name is None else copy.copy(inputs) if how.metrics_by_batch else _input(inputs, how.input_name)
    loss, logits, labels = predict(inputs)
    if logits is not None and how.preprocess_logits is not None:
        logits = how.preprocess_logits(logits, labels)
    loss = _checked(loss)
    losses = _by_row(loss, rows or 1) if how.with_losses else None
    found = {"predictions": logits, "labels": labels, "inputs": main, "losses": losses}
    return Predicted(rows or 0, loss, weight, {name: value for name, value in found.items() if value is not None})


def _kept(batch: Predicted, how: EvaluationPlan, held: Held) -> EvalPrediction | None:
    """Keep what a batch gave for the result; what compute_metrics is to be given of it."""
    record = batch.record
    if how.keep:
        only = ("predictions", "labels") if how.metrics_by_batch else tuple(record)
        held.add({name: value for name, value in record.items() if name in only}, batch.rows)
    how.on_batch()
    by_batch = how.metrics_by_batch and how.compute_metrics is not None and {"predictions", "labels"} <= record.keys()
    return _prediction(record) if by_batch else None


def _prediction(parts: Mapping[str, Any]) -> EvalPrediction:
    return EvalPrediction(parts["predictions"], parts["labels"], parts.get("inputs"), parts.get("losses"))


def _input(inputs: Any, name: str) -> Any:
    if not isinstance(inputs, Mapping) or name not in inputs:
        keys = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise BatchError(
            f'include_for_metrics=["inputs"] needs batch[{name!r}], but the batch has {keys}. Name the key of the inputs by an '
            "attribute main_input_name of the model."
        )
    return inputs[name]


def _checked(loss: Any) -> Tensor | None:
    if loss is None or isinstance(loss, Tensor):
        return loss if loss is None else loss.detach()
    raise LossError(f"prediction_step returned {type(loss).__name__} as the loss; it must be a tensor, or None.")


def _by_row(loss: Tensor | None, rows: int) -> Tensor | None:
    """The loss of a batch for each of its rows."""
    return loss if loss is None or loss.shape == (rows,) else loss.mean().expand(rows)


def plan_evaluation(
    args: Any,
    model: nn.Module,
    label_names: Sequence[str],
    *,
    prefix: str,
    keep: bool,
    weigh: Callable[[Any], Number] | None = None,
    compute_metrics: Callable[..., Any] | None = None,
    preprocess_logits: Callable[[Any, Any], Any] | None = None,
    on_batch: Callable[[], Any] = lambda: None,
    exchange: Callable[[Any], list[Any]] = alone,
    total: int | None = None,
) -> EvaluationPlan:
    """The plan that training arguments ask for.

    Args:
        args: the `TrainingArguments`.
        model: says which labels its loss counts, and by `main_input_name` which key of a batch is its input.
        label_names: the batch's keys that are labels.
        prefix: is put before the figures' names.
        keep: whether predictions are wanted also where `batch_eval_metrics` makes metrics without them, as in `predict`.
        weigh: over how many items the loss of a batch runs; by default its labels that count, or its rows.
        compute_metrics: see `EvaluationPlan`.
        preprocess_logits: see `EvaluationPlan`.
        on_batch: called after each batch.
        exchange: see `EvaluationPlan`.
        total: see `EvaluationPlan`.
    """
    included = args.include_for_metrics

    def items(batch: Any) -> Number:
        return item_count(model, batch, label_names) if isinstance(batch, Mapping) else steps.batch_size_of(batch) or 1

    return EvaluationPlan(
        prefix=prefix,
        weigh=items if weigh is None else weigh,
        compute_metrics=compute_metrics,
        metrics_by_batch=args.batch_eval_metrics,
        keep=keep or not args.batch_eval_metrics,
        concatenate=args.eval_do_concat_batches,
        input_name=getattr(model, "main_input_name", "input_ids") if "inputs" in included else None,
        with_losses="loss" in included,
        preprocess_logits=preprocess_logits,
        skip_nonfinite=args.logging_nan_inf_filter,
        hold_batches=args.eval_accumulation_steps,
        on_batch=on_batch,
        exchange=exchange,
        total=total,
    )


@attrs.define
class MeanLoss:
    """The mean of losses over all items; sums stay on the device, and are read once.

    >>> mean = MeanLoss()
    >>> mean.add(torch.tensor(1.0), 2), mean.add(torch.tensor(torch.nan), 1)
    (None, None)
    >>> mean.figures(skip_nonfinite=True)
    {'loss': 1.0}
    """

    sums: Tensor | None = None
    losses: list[Tensor] = attrs.field(factory=list)
    weights: list[Number] = attrs.field(factory=list)

    def add(self, loss: Tensor | None, weight: Number) -> None:
        """Add the mean over so many items, or of several elements with as many weights."""
        if loss is None:
            return
        of_rows = isinstance(weight, Tensor) and weight.shape == loss.shape
        self.losses.append(loss if of_rows or loss.ndim == 0 else loss.mean())
        self.weights.append(weight)
        if len(self.losses) == 256:  # a few at a time, because small operations cost as much as large ones
            self._sum()

    def figures(self, *, skip_nonfinite: bool = False) -> dict[str, float]:
        """The mean as "loss"; nothing if there was none. It is NaN where no item counted."""
        self._sum()
        if self.sums is None:
            return {}
        total, weight, finite_total, finite_weight = self.sums.tolist()
        if skip_nonfinite and finite_weight:
            total, weight = finite_total, finite_weight
        return {"loss": total / weight if weight else float("nan")}

    def _sum(self) -> None:
        if not self.losses:
            return
        losses = torch.cat([loss.reshape(-1) for loss in self.losses])
        wide = torch.float32 if losses.device.type == "mps" else torch.float64  # MPS has no float64
        losses, weights = losses.to(wide), _joined(self.weights, wide).to(losses.device)
        amounts = torch.where(weights == 0, 0.0, losses * weights)  # a mean over no items is NaN, but adds nothing
        finite = torch.isfinite(amounts)
        parts = amounts, weights, torch.where(finite, amounts, 0.0), torch.where(finite, weights, 0.0)
        sums = torch.stack([part.sum() for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums
        self.losses, self.weights = [], []


def _joined(weights: list[Number], dtype: torch.dtype) -> Tensor:
    if not any(isinstance(weight, Tensor) for weight in weights):
        return torch.tensor(weights, dtype=dtype)
    return torch.cat([torch.as_tensor(weight, dtype=dtype).reshape(-1) for weight in weights])


def rows_in(batches: Any) -> int | None:
    """How many rows a DataLoader's data has; None where that is not known, as for a list of batches.

    >>> rows_in(torch.utils.data.DataLoader([1, 2, 3], batch_size=2)), rows_in([torch.ones(2)])
    (3, None)
    """
    try:
        return len(batches.dataset)
    except (AttributeError, TypeError, NotImplementedError):  # no dataset, or one without a length
        return None


@contextmanager
def evaluating(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """No gradients, and every module in eval mode, until the block ends; then each is as it was.

    Args:
        model: its parameters and buffers stay the same objects with the same storage.
        dtype: floating-point parameters and buffers are replaced by copies of this type within the block.

    >>> net = nn.Linear(1, 1)
    >>> with evaluating(net, torch.bfloat16):
    ...     net.weight.dtype, net.training
    (torch.bfloat16, False)
    >>> net.weight.dtype, net.training
    (torch.float32, True)
    """
    with torch.no_grad(), in_eval_mode(model):
        if dtype is None:
            yield
            return
        with Binding(model).exchange(_cast(model, dtype)):
            yield


def _cast(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    cast: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach()
        data = data.to(dtype) if data.is_floating_point() else data
        cast[name] = nn.Parameter(data, requires_grad=parameter.requires_grad and data.is_floating_point())
    for name, buffer in model.named_buffers():
        cast[name] = buffer.to(dtype) if buffer.is_floating_point() else buffer
    return cast


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


def warn_of_missing_labels(model: nn.Module, label_names: Sequence[str], prefix: str) -> None:
    """Say that an evaluation gave no loss, and what it would need."""
    called = ", ".join(label_names) or "not named by the model's forward"
    logger.warning(
        "The evaluation set has no labels: there is no %s_loss, and compute_metrics is not called. The labels of %s are %s; "
        "add that column, or name yours by label_names=[...].",
        *(prefix, type(model).__name__, called),
    )
