"""Rows from many batches, written once into arrays that are allocated once."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from fts.errors import BatchError

PADDING = -100
"""What fills up rows that are shorter than others: Hugging Face's mark for a label that does not count."""


class Rows:
    """The rows of one output over all batches.

    Args:
        total: how many rows there will be; None where that is not known, and then the array grows by doubling.

    >>> rows = Rows(3)
    >>> rows.add(torch.tensor([[1, 2]])), rows.add(torch.tensor([[3], [4]]))
    (None, None)
    >>> rows.array().tolist()
    [[1, 2], [3, -100], [4, -100]]
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.count = 0
        self.store: np.ndarray[Any, Any] | None = None

    def add(self, tensor: Tensor) -> None:
        """Append the rows of a batch; a 0-d tensor is one row."""
        tensor = _readable(tensor)
        rows = tensor.shape[0]
        store = self._fitting(rows, tuple(tensor.shape[1:]), tensor)
        window = store[(slice(self.count, self.count + rows), *(slice(size) for size in tensor.shape[1:]))]
        torch.from_numpy(window).copy_(tensor)
        self.count += rows

    def array(self) -> np.ndarray[Any, Any]:
        """All rows, padded with -100 where they differ in size; a view of what was allocated."""
        if self.store is None:
            raise BatchError("There is no row: no batch was added.")
        return self.store[: self.count]

    def _fitting(self, rows: int, shape: tuple[int, ...], tensor: Tensor) -> np.ndarray[Any, Any]:
        need = self.count + rows
        old = self.store
        if old is None:
            self.store = _array(max(need, self.total or 0), shape, tensor)
            return self.store
        if len(shape) != old.ndim - 1:
            raise BatchError(f"An output has shape {[rows, *shape]} in one batch and {list(old.shape)} with others: axes differ.")
        store = old
        widest = tuple(max(sizes) for sizes in zip(shape, old.shape[1:], strict=True))
        if need > len(old) or widest != old.shape[1:]:
            store = self.store = _array(len(old) if need <= len(old) else max(need, 2 * len(old)), widest, tensor)
            if widest != old.shape[1:]:
                store.fill(_padding(tensor))
            store[(slice(self.count), *(slice(size) for size in old.shape[1:]))] = old[: self.count]
        if shape != widest:
            store[self.count : need] = _padding(tensor)
        return store


class Gathered:
    """Trees of outputs (a tensor, or tuples, lists and dictionaries of tensors) over all batches.

    Args:
        total: how many rows there will be; None where that is not known.
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.structure: Any = None
        self.rows: list[Rows] = []

    def add(self, tree: Any) -> None:
        """Append a batch's outputs; what is not a tensor is left out."""
        leaves, structure = optree.tree_flatten(tree)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self.rows:
            keep = optree.tree_map(lambda leaf: leaf if isinstance(leaf, Tensor) else None, tree)
            self.structure = optree.tree_structure(keep) if len(tensors) < len(leaves) else structure
            self.rows = [Rows(self.total) for _ in tensors]
        if len(tensors) != len(self.rows):
            raise BatchError(f"One batch gave {len(tensors)} output tensors, the first one {len(self.rows)}.")
        for rows, tensor in zip(self.rows, tensors, strict=True):
            rows.add(tensor)

    def arrays(self) -> Any:
        """The same tree, of numpy arrays; None if no tensor was added."""
        if not self.rows:
            return None
        return optree.tree_unflatten(self.structure, [rows.array() for rows in self.rows])


def _readable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()  # numpy has no bfloat16, and metrics want the range
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _array(rows: int, shape: tuple[int, ...], like: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = torch.empty((rows, *shape), dtype=like.dtype).numpy()
    return array


def _padding(like: Tensor) -> int:
    return PADDING if like.dtype.is_signed else 0
