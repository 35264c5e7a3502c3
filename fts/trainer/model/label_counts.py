"""How many labels count in a batch (`num_items_in_batch`), and by what a mean loss was divided."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fts import steps
from fts.steps.losses import base_model, shifts_labels
from fts.typing import Number

CAUSAL_LOSS_TYPES = ("ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration")
"""The values of a transformers model's `loss_type` whose loss compares position t with label t + 1."""


def count_labels(batches: Sequence[Any], shift: bool) -> Tensor | None:
    """How many labels count in several batches: those that are not -100.

    Args:
        batches: dictionaries with "labels" (of any shape), or with "shift_labels".
        shift: whether the first label of each sequence is not predicted.

    Returns:
        A 0-d int64 tensor on the labels' device; None where there are no labels.

    >>> count_labels([{"labels": torch.tensor([[1, 2, -100]])}, {"labels": torch.tensor([[3, 4, 5]])}], shift=True)
    tensor(3)
    """
    found = [_labels_to_count(batch, shift) for batch in batches]
    if not found or any(labels is None for labels in found):
        return None
    counts = [(labels != -100).sum() for labels in found if labels is not None]
    return counts[0] if len(counts) == 1 else torch.stack(counts).sum()


def _labels_to_count(batch: Any, shift: bool) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    ready = batch.get("shift_labels")
    labels = batch.get("labels") if ready is None else ready
    if not isinstance(labels, Tensor):
        return None
    return labels[..., 1:] if shift and ready is None else labels


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Whether a model's forward takes `num_items_in_batch`: by its `accepts_loss_kwargs`, or as it takes any keyword.

    >>> accepts_loss_kwargs(nn.Linear(1, 1))
    False
    """
    inner = base_model(model)
    declared = getattr(inner, "accepts_loss_kwargs", None)
    if declared is not None:
        return bool(declared)
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(inner.forward).parameters.values())


def loss_denominator(model: nn.Module, batch: Mapping[str, Any], label_names: Sequence[str]) -> Number:
    """By what the mean loss of a batch was divided: the labels that count where labels are tokens, else the batch size.

    >>> loss_denominator(nn.Linear(2, 1), {"x": torch.zeros(4, 2), "labels": torch.zeros(4)}, ["labels"])
    4
    """
    labels: Any = batch.get(label_names[0]) if label_names else None
    if steps.num_label_tokens(model, labels) is None:
        return steps.batch_size_of(batch) or 1
    shift = counts_shifted_labels(model) if accepts_loss_kwargs(model) else shifts_labels(model)
    counted: Tensor = ((labels[..., 1:] if shift else labels) != -100).sum()
    return counted


def all_labels_ignored(model: nn.Module, batch: Any, label_names: Sequence[str]) -> bool:
    """Whether all labels of a batch, or of a micro-batch of an update, are ignored (-100), so that its mean loss is 0/0.

    >>> all_labels_ignored(nn.Linear(2, 1), {"x": torch.zeros(4, 2), "labels": torch.full((4, 3), -100)}, ["labels"])
    True
    """
    parts = batch if isinstance(batch, steps.MicroBatches) else (batch,)
    found = [part.get(label_names[0]) for part in parts if label_names and isinstance(part, Mapping)]
    return any(isinstance(labels, Tensor) and _all_ignored(model, labels) for labels in found)


def _all_ignored(model: nn.Module, labels: Tensor) -> bool:
    counted = labels[..., 1:] if labels.ndim > 1 and shifts_labels(model) else labels
    return not labels.is_floating_point() and bool((counted == -100).all())


def counts_shifted_labels(model: nn.Module) -> bool:
    """Whether `num_items_in_batch` leaves out the first label of each sequence, which a causal language model does not predict.

    transformers decides it by the name of the model's loss. GPT-2 has none, so its loss is divided by all labels.

    >>> counts_shifted_labels(nn.Linear(1, 1))
    False
    """
    inner = base_model(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(inner, "loss_type", None) in CAUSAL_LOSS_TYPES
