"""Data collators: from a list of examples to a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from fts.errors import BatchError

Collator: TypeAlias = Callable[[Any], Any]


def default_data_collator(features: Sequence[Any]) -> dict[str, Any]:
    """Stack examples that have the same shapes.

    Args:
        features: dictionaries, or objects with attributes, of tensors, arrays, lists or numbers; strings and None are left out.

    Returns:
        A dictionary of tensors with a batch dimension; `label` or `label_ids` of the examples become `labels`: int64
        where they are integers, float32 otherwise.

    Raises:
        BatchError: examples are of another kind, lack a key of the first one, or differ in shape.

    >>> default_data_collator([{"x": [1.0, 2.0], "label": 1}, {"x": [3.0, 4.0], "label": 0}])
    {'labels': tensor([1, 0]), 'x': tensor([[1., 2.], [3., 4.]])}
    """
    examples = [_as_mapping(feature) for feature in features]
    first = examples[0]
    batch: dict[str, Any] = {}
    label = next((name for name in ("label", "label_ids") if first.get(name) is not None), None)
    if label is not None:
        labels = _stack(label, examples)
        batch["labels"] = labels if labels.dtype == torch.int64 else labels.long() if _is_integer(labels) else labels.float()
    for name, value in first.items():
        if name not in ("label", "label_ids") and value is not None and not isinstance(value, str):
            batch[name] = _stack(name, examples)
    return batch


def get_data_collator(processing_class: Any) -> Collator:
    """The default collator for a processing class.

    Returns:
        One that pads, for transformers' tokenizers and feature extractors of sequences, and for another class with a
        method `pad(features, padding=True, return_tensors="pt")`; else `default_data_collator`.

    >>> get_data_collator(None) is default_data_collator
    True
    """
    if any(kind.__module__.startswith("transformers.") for kind in type(processing_class).__mro__):
        return _transformers_collator(processing_class)
    return _PaddingCollator(processing_class) if callable(getattr(processing_class, "pad", None)) else default_data_collator


def _transformers_collator(processing_class: Any) -> Collator:
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, SequenceFeatureExtractor

    if not isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        return default_data_collator  # an image processor has a `pad` of another meaning
    padding: Collator = DataCollatorWithPadding(processing_class)
    return padding


@attrs.frozen
class _PaddingCollator:
    """Pads by the method of a class that is not transformers'. A class, not a closure, so that workers can receive it."""

    processing_class: Any

    def __call__(self, features: Any) -> dict[str, Any]:
        batch = dict(self.processing_class.pad(features, padding=True, return_tensors="pt"))
        for name in ("label", "label_ids"):
            if name in batch:
                batch["labels"] = batch.pop(name)
        return batch


def _as_mapping(feature: Any) -> Mapping[str, Any]:
    if isinstance(feature, Mapping):
        return feature
    if hasattr(feature, "__dict__"):
        attributes: Mapping[str, Any] = vars(feature)
        return attributes
    raise BatchError(
        f"An example of the data is a {type(feature).__name__}; the default collator needs dictionaries such as "
        '{"input_ids": ..., "labels": ...}. Change the dataset, or pass data_collator=.'
    )


def _stack(name: str, examples: Sequence[Mapping[str, Any]]) -> Tensor:
    try:
        values = [example[name] for example in examples]
    except KeyError:
        raise BatchError(f"The first example of a batch has {name!r}, another one lacks it. Give all the same keys.") from None
    try:
        if isinstance(values[0], Tensor):
            return torch.stack(values)
        if isinstance(values[0], (np.ndarray, np.generic)):
            return torch.from_numpy(np.stack(values))
        return torch.tensor(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BatchError(
            f"The values of {name!r} cannot be stacked to one tensor: {error}. Pad them to one length: pass a tokenizer as "
            "processing_class=, or a data_collator=."
        ) from error


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()
