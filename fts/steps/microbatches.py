"""Cutting a batch into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import optree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor

from fts.errors import BatchError
from fts.typing import Batch


class MicroBatches(tuple[Batch, ...]):
    """Several batches that together make one step.

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


class PaddingBatch(NamedTuple):  # which a graph can build
    """A micro-batch that only keeps processes in step: it is computed as the others are, and counts with weight 0.

    Where a step has fewer micro-batches than there are places on all processes, the others get one of these, since collective
    operations within forward and backward wait for all processes.

    Args:
        batch: what is computed, usually a micro-batch that counted elsewhere.

    >>> PaddingBatch([1, 2])
    Weightless(batch=[1, 2])
    """

    batch: Batch


def batch_size_of(batch: Batch) -> int | None:
    """How many rows a batch has: the first dimension of its first tensor, or None where it has no such tensor.

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
    """Cut a batch along its rows into `count` micro-batches of equal size, the last one possibly shorter or absent.

    Args:
        batch: a tensor, or dicts, lists and tuples of tensors with the same first dimension. Lists of other values
            are cut too where they have one item a row; what has no rows goes to each micro-batch whole.
        count: how many micro-batches to make, at least 1.

    Returns:
        At most `count` micro-batches, each with at least one row; their tensors are views.

    Raises:
        BatchError: the batch has no rows, or its tensors have different numbers of rows.

    >>> import torch
    >>> [part["x"].tolist() for part in split_microbatches({"x": torch.arange(5)}, 2)]
    [[0, 1, 2], [3, 4]]
    """
    total = batch_size_of(batch)
    if not total:
        raise BatchError(
            f"A batch of type {type(batch).__name__} with {'no tensor' if total is None else '0 rows'} cannot be cut into "
            f"{count} micro-batches. Give a batch of tensors whose first dimension counts rows, or a MicroBatches of ready ones."
        )
    size = -(-total // count)
    return MicroBatches(_rows_of(batch, start, min(start + size, total), total) for start in range(0, total, size))


def _rows_of(batch: Any, start: int, stop: int, total: int) -> Any:
    if isinstance(batch, Tensor):
        if batch.ndim == 0:
            return batch
        if batch.shape[0] != total:
            raise BatchError(
                f"The batch's tensors have different numbers of rows: {total} and {batch.shape[0]} (shape {list(batch.shape)}). "
                "To accumulate over micro-batches, give every tensor the batch as its first dimension."
            )
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: _rows_of(value, start, stop, total) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        if len(batch) == total and batch_size_of(batch) is None:
            return batch[start:stop]
        parts = [_rows_of(value, start, stop, total) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
