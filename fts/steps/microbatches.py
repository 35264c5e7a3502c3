"""Micro-batches of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import optree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor

from fts.errors import BatchError
from fts.typing import Batch


class MicroBatches(tuple[Batch, ...]):
    """The micro-batches of one step.

    A type of its own, because a plain list or tuple is often a single batch, such as `[inputs, targets]`.

    >>> MicroBatches([1, 2])
    MicroBatches(1, 2)
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"MicroBatches({', '.join(map(repr, self))})"


optree.register_pytree_node(
    cast(Any, MicroBatches), lambda parts: (tuple(parts), None), lambda _, parts: MicroBatches(parts), namespace=GLOBAL_NAMESPACE
)


class PaddingBatch(NamedTuple):  # a type that can be built inside a graph
    """A micro-batch that pads a step, so that all ranks run equally many: it is computed, and has weight 0.

    Collectives in the forward and backward pass need all ranks. A rank without a micro-batch of its own gets one of these.

    Args:
        batch: usually a copy of another micro-batch.

    >>> PaddingBatch([1, 2])
    PaddingBatch(batch=[1, 2])
    """

    batch: Batch


def batch_size_of(batch: Batch) -> int | None:
    """The number of examples in a batch: the first dimension of its first tensor, or None if it has no such tensor.

    >>> import torch
    >>> batch_size_of({"x": torch.zeros(3, 2)})
    3
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    children = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    for child in children:
        found = batch_size_of(child)
        if found is not None:
            return found
    return None


def split_microbatches(batch: Batch, count: int) -> MicroBatches:
    """Split a batch into `count` micro-batches of equal size; the last ones may be shorter or missing.

    Args:
        batch: a tensor, or dicts, lists and tuples of tensors with the same first dimension. Lists of other values
            are split too if they have one item for each example; other values go to each micro-batch as they are.
        count: the number of micro-batches, at least 1.

    Returns:
        At most `count` micro-batches, each with at least one example; their tensors are views.

    Raises:
        BatchError: the batch has no examples, or its tensors have different batch sizes.

    >>> import torch
    >>> [part["x"].tolist() for part in split_microbatches({"x": torch.arange(5)}, 2)]
    [[0, 1, 2], [3, 4]]
    """
    total = batch_size_of(batch)
    if not total:
        raise BatchError(
            f"A batch of type {type(batch).__name__} with {'no tensor' if total is None else '0 examples'} cannot be split into "
            f"{count} micro-batches. Give a batch of tensors whose first dimension is the batch size, or MicroBatches."
        )
    size = -(-total // count)
    return MicroBatches(_slice(batch, start, min(start + size, total), total) for start in range(0, total, size))


def _slice(batch: Any, start: int, stop: int, total: int) -> Any:
    if isinstance(batch, Tensor):
        if batch.ndim == 0:
            return batch
        if batch.shape[0] != total:
            raise BatchError(
                f"The batch's tensors have different batch sizes: {total} and {batch.shape[0]} (shape {list(batch.shape)}). "
                "To accumulate over micro-batches, give every tensor the batch as its first dimension."
            )
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: _slice(value, start, stop, total) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        if len(batch) == total and batch_size_of(batch) is None:
            return batch[start:stop]
        parts = [_slice(value, start, stop, total) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
