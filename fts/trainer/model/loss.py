"""The loss of a micro-batch in Hugging Face's scale."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from fts import steps
from fts.errors import BatchError, LossError
from fts.steps.losses import as_loss_output, base_model, shifts_labels
from fts.typing import LossOutput, Number

CAUSAL = ("ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration")
"""The values of a transformers model's `loss_type` whose loss compares position t with label t + 1."""


class Items(NamedTuple):
    """What a micro-batch's loss is told of the whole step.

    Attributes:
        labels: how many labels count in all micro-batches together, a 0-d tensor; None where nobody wants to know.
        parts: how many micro-batches there are, those of other processes included: a 0-d tensor if there are any.
    """

    labels: Tensor | None
    parts: Number


@attrs.frozen
class LossRule:
    """How the loss of a micro-batch is computed, and scaled.

    Attributes:
        label_names: the batch's keys that are labels.
        fn: `fn(outputs, labels, num_items_in_batch=...)`, Hugging Face's `compute_loss_func`; None: the model computes its own.
        smoothing: label smoothing between 0 and 1, instead of the model's own loss.
        accepts_count: whether the model's forward takes `num_items_in_batch`, and divides by it.
        scaled: whether the loss is divided by the items of the whole step already; None: where it was given their number.
    """

    label_names: Sequence[str]
    fn: Callable[..., Any] | None = None
    smoothing: float = 0.0
    accepts_count: bool = False
    scaled: bool | None = None

    @property
    def __name__(self) -> str:
        if self.fn is not None:
            return str(getattr(self.fn, "__name__", type(self.fn).__name__))
        return f"label smoothing {self.smoothing}" if self.smoothing else "the model's own loss"

    @property
    def counts(self) -> bool:
        """Whether the number of labels in the whole step is needed."""
        return self.accepts_count or self.fn is not None

    def is_scaled(self, count: Tensor | int | None) -> bool:
        """Whether losses are parts of the step's mean, which add up to it, rather than means of their own."""
        if self.scaled is not None:
            return self.scaled
        return (self.accepts_count and count is not None) or self.fn is not None


def compute_loss(
    model: Any, inputs: Mapping[str, Any], rule: LossRule, count: Tensor | int | None = None
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
    names = [name for name in rule.label_names if name in inputs] if rule.fn is not None or rule.smoothing else []
    labels = tuple(inputs[name] for name in names)
    given = {name: value for name, value in inputs.items() if name not in names}
    if rule.accepts_count and count is not None:
        given["num_items_in_batch"] = count
    outputs = model(**given)
    if rule.fn is not None:
        one = labels[0] if len(labels) == 1 else labels or None
        return as_loss_output(rule.fn(outputs, one, num_items_in_batch=count)), outputs
    if labels and rule.smoothing:
        return LossOutput(smoothed_loss(logits_in(outputs), labels[0], rule.smoothing, shifts_labels(model), count)), outputs
    loss = steps.extract_loss(outputs)
    if loss is None:
        raise LossError(
            f"The model {type(model).__name__} returned {type(outputs).__name__} without a loss for a batch with the keys "
            f'{", ".join(map(str, inputs))}. Return it as "loss" or as the first of a tuple, or pass compute_loss_func=.'
        )
    return LossOutput(loss), outputs


def smoothed_loss(logits: Tensor, labels: Tensor, epsilon: float, shift: bool, count: Tensor | int | None = None) -> Tensor:
    """Cross entropy with label smoothing, over the labels that are not -100.

    Args:
        logits: of shape [..., classes].
        labels: int64 of shape [...].
        epsilon: the share of the target that is spread over all classes (Szegedy et al. 2016).
        shift: whether position t predicts label t + 1.
        count: what the sum is divided by; by default the labels that count.

    >>> smoothed_loss(torch.zeros(1, 2, 4), torch.tensor([[1, -100]]), 0.1, shift=False)
    tensor(1.3863)
    """
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    flat, targets = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    total = nn.functional.cross_entropy(flat, targets, reduction="sum", label_smoothing=epsilon)
    divisor = (targets != -100).sum() if count is None else count
    return total / (divisor.to(total.device) if isinstance(divisor, Tensor) else divisor)


def logits_in(outputs: Any) -> Tensor:
    """The logits among a model's outputs: "logits", or the first of a tuple."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        logits = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    if not isinstance(logits, Tensor):
        raise LossError(f"Label smoothing needs the model's logits, but it returned {type(outputs).__name__} without any.")
    return logits


def step_loss(
    compute: Callable[[Any, Any, Tensor | None], Any], rule: LossRule
) -> Callable[[Any, Mapping[str, Any], Items], LossOutput]:
    """The loss of a micro-batch as the core wants it: (model, batch, items) -> a loss whose plain mean is the step's.

    The core divides by the number of micro-batches, so losses that add up to the step's mean are multiplied by it.

    Args:
        compute: `(model, batch, count)` -> a loss in any of the forms that `fts.typing.LossFn` names.
        rule: says whether that loss is scaled.
    """

    def loss(model: Any, batch: Mapping[str, Any], items: Items) -> LossOutput:
        output = as_loss_output(compute(model, batch, items.labels))
        value = output.loss * items.parts if rule.is_scaled(items.labels) else output.loss
        weighted = {
            name: metric if isinstance(metric, tuple) else (metric, item_count(model, batch, rule.label_names))
            for name, metric in output.metrics.items()
        }
        return LossOutput(value, 1, weighted)

    loss.__name__ = str(getattr(compute, "__name__", None) or rule.__name__)
    return loss


def own_loss(rule: LossRule) -> Callable[[Any, Any, Tensor | None], LossOutput]:
    """The rule's loss, for `step_loss`."""

    def compute(model: Any, batch: Any, count: Tensor | None) -> LossOutput:
        return compute_loss(model, batch, rule, count)[0]

    compute.__name__ = rule.__name__
    return compute


def count_labels(batches: Sequence[Any], shift: bool) -> Tensor | None:
    """How many labels count in several batches: those that are not -100.

    Args:
        batches: dictionaries with "labels" (of any shape), or with "shift_labels".
        shift: whether the first label of a row is not predicted.

    Returns:
        A 0-d int64 tensor on the labels' device; None where there are no labels.

    >>> count_labels([{"labels": torch.tensor([[1, 2, -100]])}, {"labels": torch.tensor([[3, 4, 5]])}], shift=True)
    tensor(3)
    """
    found = [_countable(batch, shift) for batch in batches]
    if not found or any(labels is None for labels in found):
        return None
    counts = [(labels != -100).sum() for labels in found if labels is not None]
    return counts[0] if len(counts) == 1 else torch.stack(counts).sum()


def _countable(batch: Any, shift: bool) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    ready = batch.get("shift_labels")
    labels = batch.get("labels") if ready is None else ready
    if not isinstance(labels, Tensor):
        return None
    return labels[..., 1:] if shift and ready is None else labels


def accepts_count(model: nn.Module) -> bool:
    """Whether a model's forward takes `num_items_in_batch`: it says so, or takes any keyword.

    >>> accepts_count(nn.Linear(1, 1))
    False
    """
    inner = base_model(model)
    said = getattr(inner, "accepts_loss_kwargs", None)
    if said is not None:
        return bool(said)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(inner.forward).parameters.values())


def smoothing_of(factor: float, model: nn.Module) -> float:
    """The label smoothing of a run: none, with a warning, where a row has several labels."""
    if factor and getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        warnings.warn(
            "Label smoothing is not compatible with multi-label classification; this run does without it.",
            UserWarning,
            stacklevel=3,
        )
        return 0.0
    return factor


def item_count(model: nn.Module, batch: Mapping[str, Any], label_names: Sequence[str]) -> Number:
    """Over how many items a batch's mean loss runs: labels that count where labels are tokens, else rows.

    >>> item_count(nn.Linear(2, 1), {"x": torch.zeros(4, 2), "labels": torch.zeros(4)}, ["labels"])
    4
    """
    labels: Any = batch.get(label_names[0]) if label_names else None
    if steps.num_label_tokens(model, labels) is None:
        return steps.batch_size_of(batch) or 1
    shift = counts_shifted(model) if accepts_count(model) else shifts_labels(model)
    counted: Tensor = ((labels[..., 1:] if shift else labels) != -100).sum()
    return counted


def lacks_labels(model: nn.Module, batch: Any, label_names: Sequence[str]) -> bool:
    """Whether a batch, or one of the micro-batches of an update, has labels of which none counts, so that their mean is 0/0.

    >>> lacks_labels(nn.Linear(2, 1), {"x": torch.zeros(4, 2), "labels": torch.full((4, 3), -100)}, ["labels"])
    True
    """
    parts = batch if isinstance(batch, steps.MicroBatches) else (batch,)
    found = [part.get(label_names[0]) for part in parts if label_names and isinstance(part, Mapping)]
    return any(isinstance(labels, Tensor) and _counts_none(model, labels) for labels in found)


def _counts_none(model: nn.Module, labels: Tensor) -> bool:
    counted = labels[..., 1:] if labels.ndim > 1 and shifts_labels(model) else labels
    return not labels.is_floating_point() and bool((counted == -100).all())


def weight_by(model: nn.Module, rule: LossRule) -> Callable[[Any], Number]:
    """From a batch to the weight of its loss among those of other batches: what the loss was divided by."""

    def weigh(batch: Any) -> Number:
        count = count_labels([batch], counts_shifted(model)) if rule.counts else None
        if count is not None:
            return count
        return item_count(model, batch, rule.label_names) if isinstance(batch, Mapping) else steps.batch_size_of(batch) or 1

    return weigh


def counts_shifted(model: nn.Module) -> bool:
    """Whether `num_items_in_batch` leaves out the first label of each row, which a causal language model does not predict.

    As Hugging Face decides it, by the name of the model's loss; GPT-2 has none, so its loss is divided by all labels.

    >>> counts_shifted(nn.Linear(1, 1))
    False
    """
    inner = base_model(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(inner, "loss_type", None) in CAUSAL
