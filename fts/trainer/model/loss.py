"""The loss of a micro-batch, scaled as transformers' Trainer scales it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import attrs
from torch import Tensor, nn

from fts import steps
from fts.errors import BatchError, LossError
from fts.steps.losses import as_loss_output, shifts_labels
from fts.trainer.model.label_counts import count_labels, counts_shifted_labels, loss_denominator
from fts.typing import LossOutput, Number


class UpdateTotals(NamedTuple):
    """Totals of an update, by which the losses of its micro-batches are scaled.

    Attributes:
        num_items_in_batch: how many labels count in all micro-batches, a 0-d tensor; None where that is not needed.
        num_micro_batches: how many micro-batches there are on all ranks; a 0-d tensor if there are several ranks.
    """

    num_items_in_batch: Tensor | None
    num_micro_batches: Number


@attrs.frozen
class LossConfig:
    """How the loss of a micro-batch is computed, and scaled.

    Attributes:
        label_names: the batch's keys that are labels.
        compute_loss_func: `fn(outputs, labels, num_items_in_batch=...)`; None: the model computes its own loss.
        label_smoothing: label smoothing between 0 and 1, instead of the model's own loss.
        accepts_loss_kwargs: whether the model's forward takes `num_items_in_batch`, and divides by it.
        loss_is_scaled: whether the loss is already divided by `num_items_in_batch`; None: where it got that number.
    """

    label_names: Sequence[str]
    compute_loss_func: Callable[..., Any] | None = None
    label_smoothing: float = 0.0
    accepts_loss_kwargs: bool = False
    loss_is_scaled: bool | None = None

    @property
    def __name__(self) -> str:
        if self.compute_loss_func is not None:
            return str(getattr(self.compute_loss_func, "__name__", type(self.compute_loss_func).__name__))
        return f"label smoothing {self.label_smoothing}" if self.label_smoothing else "the model's own loss"

    @property
    def needs_num_items(self) -> bool:
        """Whether `num_items_in_batch` is needed."""
        return self.accepts_loss_kwargs or self.compute_loss_func is not None

    def is_scaled(self, count: Tensor | int | None) -> bool:
        """Whether the losses of micro-batches add up to the mean over the update, rather than being means themselves."""
        if self.loss_is_scaled is not None:
            return self.loss_is_scaled
        return (self.accepts_loss_kwargs and count is not None) or self.compute_loss_func is not None


def compute_loss(
    model: Any, inputs: Mapping[str, Any], config: LossConfig, count: Tensor | int | None = None
) -> tuple[LossOutput, Any]:
    """Run a model on one micro-batch.

    Args:
        model: is called as `model(**inputs)`.
        inputs: is not changed.
        config: how the loss is computed.
        count: `num_items_in_batch`, the labels that count in the update.

    Returns:
        The loss (with the metrics that `compute_loss_func` returned, if any) and the model's outputs.

    Raises:
        BatchError: the batch is no dictionary.
        LossError: the model returned no loss.
    """
    if not isinstance(inputs, Mapping):
        raise BatchError(
            f"The Trainer calls model(**batch), so a batch must be a dictionary, not {type(inputs).__name__}. "
            "Return dictionaries from the data_collator."
        )
    own_loss = config.compute_loss_func is not None or bool(config.label_smoothing)
    names = [name for name in config.label_names if name in inputs] if own_loss else []
    labels = tuple(inputs[name] for name in names)
    given = {name: value for name, value in inputs.items() if name not in names}
    if config.accepts_loss_kwargs and count is not None:
        given["num_items_in_batch"] = count
    outputs = model(**given)
    if config.compute_loss_func is not None:
        one = labels[0] if len(labels) == 1 else labels or None
        return as_loss_output(config.compute_loss_func(outputs, one, num_items_in_batch=count)), outputs
    if labels and config.label_smoothing:
        logits, shift = extract_logits(outputs), shifts_labels(model)
        return LossOutput(label_smoothing_loss(logits, labels[0], config.label_smoothing, shift, count)), outputs
    loss = steps.extract_loss(outputs)
    if loss is None:
        raise LossError(
            f"The model {type(model).__name__} returned {type(outputs).__name__} without a loss for a batch with the keys "
            f'{", ".join(map(str, inputs))}. Return it as "loss" or as the first of a tuple, or pass compute_loss_func=.'
        )
    return LossOutput(loss), outputs


def label_smoothing_loss(
    logits: Tensor, labels: Tensor, epsilon: float, shift: bool, count: Tensor | int | None = None
) -> Tensor:
    """Cross entropy with label smoothing, over the labels that are not -100.

    Args:
        logits: of shape [..., classes].
        labels: int64 of shape [...].
        epsilon: the share of the target that all classes get alike (Szegedy et al. 2016).
        shift: whether position t predicts label t + 1.
        count: what the sum is divided by; by default the labels that count.

    >>> import torch
    >>> label_smoothing_loss(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]), 0.1, shift=False)
    tensor(1.3863)
    """
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    total = nn.functional.cross_entropy(flat, targets, reduction="sum", label_smoothing=epsilon)
    divisor = (targets != -100).sum() if count is None else count
    return total / (divisor.to(total.device) if isinstance(divisor, Tensor) else divisor)


def extract_logits(outputs: Any) -> Tensor:
    """The logits in a model's outputs: "logits", or the first of a tuple."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    if not isinstance(logits, Tensor):
        raise LossError(f"Label smoothing needs the model's logits, but it returned {type(outputs).__name__} without any.")
    return logits


def micro_batch_loss(
    compute: Callable[[Any, Any, Tensor | None], Any], config: LossConfig
) -> Callable[[Any, Mapping[str, Any], UpdateTotals], LossOutput]:
    """The loss of a micro-batch for `fts.steps`, scaled so that the mean over micro-batches is the loss of the update.

    The step divides by the number of micro-batches, so losses that add up to the update's mean are multiplied by it.

    Args:
        compute: `(model, batch, count)` -> a loss in any of the forms that `fts.typing.LossFn` names.
        config: whether that loss is scaled.
    """

    def loss(model: Any, batch: Mapping[str, Any], totals: UpdateTotals) -> LossOutput:
        output = as_loss_output(compute(model, batch, totals.num_items_in_batch))
        value = output.loss * totals.num_micro_batches if config.is_scaled(totals.num_items_in_batch) else output.loss
        weighted = {
            name: metric if isinstance(metric, tuple) else (metric, loss_denominator(model, batch, config.label_names))
            for name, metric in output.metrics.items()
        }
        return LossOutput(value, 1, weighted)

    loss.__name__ = str(getattr(compute, "__name__", None) or config.__name__)
    return loss


def compute_loss_fn(config: LossConfig) -> Callable[[Any, Any, Tensor | None], LossOutput]:
    """`compute_loss` with a configuration, for `micro_batch_loss`."""

    def compute(model: Any, batch: Any, count: Tensor | None) -> LossOutput:
        return compute_loss(model, batch, config, count)[0]

    compute.__name__ = config.__name__
    return compute


def resolve_label_smoothing(factor: float, model: nn.Module) -> float:
    """The label smoothing of a run: none, with a warning, where an example has several labels."""
    if factor and getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        warnings.warn(
            "Label smoothing is not compatible with multi-label classification; this run does without it.",
            UserWarning,
            stacklevel=3,
        )
        return 0.0
    return factor


def loss_weight_fn(model: nn.Module, config: LossConfig) -> Callable[[Any], Number]:
    """From a batch to the weight of its loss in a mean over batches: what the loss was divided by."""

    def loss_weight(batch: Any) -> Number:
        count = count_labels([batch], counts_shifted_labels(model)) if config.needs_num_items else None
        if count is not None:
            return count
        return (
            loss_denominator(model, batch, config.label_names) if isinstance(batch, Mapping) else steps.batch_size_of(batch) or 1
        )

    return loss_weight
