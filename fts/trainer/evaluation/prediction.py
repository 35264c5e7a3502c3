"""Prediction of one batch: its loss, logits and labels."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from fts.dtensors import full_tensor
from fts.errors import BatchError, LossError
from fts.trainer.evaluation.pytree import tree_map

_HALF = (torch.bfloat16, torch.float16)


class BatchPrediction(NamedTuple):
    """A 0-d loss, logits and labels of a batch; each None where there is none."""

    loss: Tensor | None
    logits: Any
    labels: Any


@attrs.frozen
class PredictionConfig:
    """How a batch is predicted.

    Attributes:
        compute_loss: `(model, inputs) -> (loss, outputs)`; may take labels out of the copy that it gets.
        label_names: the batch's keys that are labels.
        can_return_loss: whether the model returns a loss without labels, unless the batch says otherwise by `return_loss`.
        context: is entered around the model and its loss, such as autocast.
    """

    compute_loss: Callable[[nn.Module, Any], tuple[Any, Any]]
    label_names: Sequence[str]
    can_return_loss: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def predict_batch(
    model: nn.Module,
    inputs: Mapping[str, Any],
    config: PredictionConfig,
    *,
    ignore_keys: Sequence[str] | None = None,
    prediction_loss_only: bool = False,
) -> BatchPrediction:
    """Run a model on one batch without gradients.

    A batch that has all labels, or a model that needs none for its loss, gives a loss. All outputs but the loss and the
    ignored keys are logits: a single output is returned itself, several as a tuple. Outputs without a tensor are
    left out. Where `context` is autocast, half-precision outputs become float32.

    Args:
        model: is called as `model(**inputs)` where there are no labels.
        inputs: the batch; is not changed.
        config: how the loss is computed.
        ignore_keys: outputs that are not predictions; None: those that the model's config names.
        prediction_loss_only: return the loss alone.

    Returns:
        The loss, its mean if it has several elements; logits; labels, a tuple where there are several names.

    Raises:
        BatchError: the batch is no dictionary.
        LossError: compute_loss returned something else.

    >>> net = lambda x, labels=None: {"loss": (x - labels).square().mean(), "logits": x}
    >>> config = PredictionConfig(lambda model, inputs: ((outputs := model(**inputs))["loss"], outputs), ["labels"])
    >>> predict_batch(net, {"x": torch.tensor([1.0, 2.0]), "labels": torch.zeros(2)}, config)
    BatchPrediction(loss=tensor(2.5000), logits=tensor([1., 2.]), labels=tensor([0., 0.]))
    """
    if not isinstance(inputs, Mapping):
        raise BatchError(
            f"The Trainer calls model(**batch), so a batch must be a dictionary, not {type(inputs).__name__}. Return "
            "dictionaries from the data_collator, or override prediction_step."
        )
    ignored = keys_to_ignore(model) if ignore_keys is None else ignore_keys
    labelled = has_loss(inputs, config.label_names, config.can_return_loss)
    labels = tuple(tree_map(_detach, inputs.get(name)) for name in config.label_names) if labelled else None
    loss = None
    with torch.no_grad(), config.context():
        batch = copy.copy(inputs)
        if labelled:
            raw, outputs = _loss_and_outputs(config.compute_loss(model, batch))
            logits = select_logits(outputs, [*ignored, "loss"], loss=raw)
            loss = _mean_loss(raw)
        else:
            logits = select_logits(model(**batch), ignored)
        logits = None if prediction_loss_only else tree_map(_to_float, logits)
    if prediction_loss_only:
        return BatchPrediction(loss, None, None)
    return BatchPrediction(loss, logits, labels[0] if labels is not None and len(labels) == 1 else labels)


def has_loss(inputs: Mapping[str, Any], label_names: Sequence[str], can_return_loss: bool = False) -> bool:
    """Whether a model computes a loss of a batch: it has all labels, or the model has none and needs none.

    >>> has_loss({"x": 1, "labels": 2}, ["labels"]), has_loss({"x": 1}, [], can_return_loss=True)
    (True, True)
    >>> has_loss({"x": 1}, ["labels"], can_return_loss=True), has_loss({"return_loss": False}, [], can_return_loss=True)
    (False, False)
    """
    if label_names:
        return all(inputs.get(name) is not None for name in label_names)
    return_loss = inputs.get("return_loss")
    return bool(can_return_loss if return_loss is None else return_loss)


def keys_to_ignore(model: Any) -> list[str]:
    """The outputs that a model's config says are not predictions, such as caches; none for a model without a config.

    >>> keys_to_ignore(nn.Linear(1, 1))
    []
    """
    config = getattr(model, "config", None)
    return [] if config is None else list(getattr(config, "keys_to_ignore_at_inference", ["cache"]))


def select_logits(outputs: Any, ignored: Sequence[str] = (), loss: Any = None) -> Any:
    """The predictions in a model's outputs: all with a tensor that are not ignored, and not the loss.

    Args:
        outputs: a dictionary, tuple, object with attributes, or tensor.
        ignored: names of outputs to leave out, where they have names.
        loss: the loss of the batch, which may be the first of a tuple.

    Returns:
        A single output itself, else a tuple.

    >>> select_logits({"loss": torch.zeros(()), "logits": torch.ones(1), "cache": None}, ["loss"])
    tensor([1.])
    >>> select_logits((torch.zeros(()), torch.ones(1)), loss=torch.zeros(()))
    tensor([1.])
    """
    if isinstance(outputs, Tensor):
        return () if outputs is loss else outputs
    names = _named_outputs(outputs)
    if names is not None:
        parts = [value for name, value in names.items() if name not in ignored]
    else:
        parts = list(outputs) if isinstance(outputs, (list, tuple)) else []
        if loss is not None and parts and _is_loss(parts[0], loss):
            parts = parts[1:]
    kept = tuple(part for part in parts if _contains_tensor(part))
    return kept[0] if len(kept) == 1 else kept


def _is_loss(first: Any, loss: Any) -> bool:
    # a custom loss may be computed from a tuple of logits alone, so the first of a tuple need not be the loss
    return first is loss or (isinstance(first, Tensor) and first.ndim == 0)


def _named_outputs(outputs: Any) -> Mapping[str, Any] | None:
    if isinstance(outputs, Mapping):
        return outputs
    if hasattr(outputs, "_asdict"):
        found: Mapping[str, Any] = outputs._asdict()
        return found
    if isinstance(outputs, (list, tuple)):
        return None
    if attrs.has(type(outputs)):
        return {field.name: getattr(outputs, field.name) for field in attrs.fields(type(outputs))}
    if dataclasses.is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return getattr(outputs, "__dict__", None)


def _contains_tensor(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return True
    children = tree if isinstance(tree, (list, tuple)) else tree.values() if isinstance(tree, Mapping) else ()
    return any(map(_contains_tensor, children))


def _loss_and_outputs(found: Any) -> tuple[Any, Any]:
    if not isinstance(found, tuple) or len(found) != 2:
        raise LossError(f"compute_loss returned {type(found).__name__}; with return_outputs=True it must return (loss, outputs).")
    return found


def _mean_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossError(
            f"compute_loss returned {type(loss).__name__} as the loss of a batch with labels; it must be a tensor. Return it "
            'from the model as "loss" or as the first of a tuple, or pass compute_loss_func=.'
        )
    return full_tensor(loss.detach()).mean()


def _detach(leaf: Any) -> Any:
    return full_tensor(leaf.detach()) if isinstance(leaf, Tensor) else leaf


def _to_float(leaf: Any) -> Any:
    leaf = _detach(leaf)
    if isinstance(leaf, Tensor) and leaf.dtype in _HALF and torch.is_autocast_enabled(leaf.device.type):
        return leaf.float()
    return leaf
