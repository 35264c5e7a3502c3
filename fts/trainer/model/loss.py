"""The loss of a micro-batch in Hugging Face's scale."""

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
    """What a micro-batch's loss is told of the whole step.

    Attributes:
        labels: how many labels count in all micro-batches together, a 0-d tensor; None where nobody wants to know.
        parts: how many micro-batches there are, those of other processes included: a 0-d tensor if there are any.
    """

    labels: Tensor | None
    parts: Number


@attrs.frozen
class LossConfig:
    """How the loss of a micro-batch is computed, and scaled.

    Attributes:
        label_names: the batch's keys that are labels.
        compute_loss_func: `compute_loss_func(outputs, labels, num_items_in_batch=...)`, Hugging Face's `compute_loss_func`; None: the model computes its own.
        label_smoothing: label smoothing between 0 and 1, instead of the model's own loss.
        accepts_loss_kwargs: whether the model's forward takes `num_items_in_batch`, and divides by it.
        loss_is_scaled: whether the loss is divided by the items of the whole step already; None: where it was given their number.
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
    def counts(self) -> bool:
        """Whether the number of labels in the whole step is needed."""
        return self.accepts_loss_kwargs or self.compute_loss_func is not None

    def is_scaled(self, count: Tensor | int | None) -> bool:
        """Whether losses are parts of the step's mean, which add up to it, rather than means of their own."""
        if self.loss_is_scaled is not None:
            return self.loss_is_scaled
        return (self.accepts_loss_kwargs and count is not None) or self.compute_loss_func is not None


def compute_loss(
    model: Any, inputs: Mapping[str, Any], rule: LossConfig, count: Tensor | int | None = None
) -> tuple[LossOutput, Any]:
    """Run a model on one micro-batch.

    Args:
        model: is called as `model(**inputs)`.
        inputs: is not changed.
        rule: how the loss is computed.
        count: `num_items_in_batch`, the labels that count in the whole step.

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
    names = [name for name in rule.label_names if name in inputs] if rule.compute_loss_func is not None or rule.label_smoothing else []
    labels = tuple(inputs[name] for name in names)
    given = {name: value for name, value in inputs.items() if name not in names}
    if rule.accepts_loss_kwargs and count is not None:
        given["num_items_in_batch"] = count
    outputs = model(**given)
    if rule.compute_loss_func is not None:
        one = labels[0] if len(labels) == 1 else labels or None
        return as_loss_output(rule.compute_loss_func(outputs, one, num_items_in_batch=count)), outputs
    if labels and rule.label_smoothing:
        return LossOutput(
            label_smoothing_loss(extract_logits(outputs), labels[0], rule.label_smoothing, shifts_labels(model), count)
        ), outputs
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
        epsilon: the share of the target that is spread over all classes (Szegedy et al. 2016).
        shift: whether position t predicts label t + 1.
        count: what the sum is divided by; by default the labels that count.

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
    """The logits among a model's outputs: "logits", or the first of a tuple."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    if not isinstance(logits, Tensor):
        raise LossError(f"Label smoothing needs the model's logits, but it returned {type(outputs).__name__} without any.")
    return logits


def micro_batch_loss(
    compute: Callable[[Any, Any, Tensor | None], Any], rule: LossConfig
) -> Callable[[Any, Mapping[str, Any], UpdateTotals], LossOutput]:
    """The loss of a micro-batch as the core wants it: (model, batch, items) -> a loss whose plain mean is the step's.

    The core divides by the number of micro-batches, so losses that add up to the step's mean are multiplied by it.

    Args:
        compute: `(model, batch, count)` -> a loss in any of the forms that `fts.typing.LossFn` names.
        rule: says whether that loss is scaled.
    """

    def loss(model: Any, batch: Mapping[str, Any], items: UpdateTotals) -> LossOutput:
        output = as_loss_output(compute(model, batch, items.labels))
        value = output.loss * items.parts if rule.is_scaled(items.labels) else output.loss
        weighted = {
            name: metric if isinstance(metric, tuple) else (metric, loss_denominator(model, batch, rule.label_names))
            for name, metric in output.metrics.items()
        }
        return LossOutput(value, 1, weighted)

    loss.__name__ = str(getattr(compute, "__name__", None) or rule.__name__)
    return loss


def compute_loss_fn(rule: LossConfig) -> Callable[[Any, Any, Tensor | None], LossOutput]:
    """The rule's loss, for `micro_batch_loss`."""

    def compute(model: Any, batch: Any, count: Tensor | None) -> LossOutput:
        return compute_loss(model, batch, rule, count)[0]

    compute.__name__ = rule.__name__
    return compute


def resolve_label_smoothing(factor: float, model: nn.Module) -> float:
    """The label smoothing of a run: none, with a warning, where a row has several labels."""
    if factor and getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        warnings.warn(
            "Label smoothing is not compatible with multi-label classification; this run does without it.",
            UserWarning,
            stacklevel=3,
        )
        return 0.0
    return factor


def loss_weight_fn(model: nn.Module, rule: LossConfig) -> Callable[[Any], Number]:
    """From a batch to the weight of its loss among those of other batches: what the loss was divided by."""

    def weigh(batch: Any) -> Number:
        count = count_labels([batch], counts_shifted_labels(model)) if rule.counts else None
        if count is not None:
            return count
        return loss_denominator(model, batch, rule.label_names) if isinstance(batch, Mapping) else steps.batch_size_of(batch) or 1

    return weigh
