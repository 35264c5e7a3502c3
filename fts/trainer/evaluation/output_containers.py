"""Containers for the outputs of all batches, which are written into arrays that are allocated once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fts.errors import BatchError
from fts.trainer.evaluation.arrays import Array, ArrayAllocator
from fts.trainer.evaluation.pytree import tree_leaves_with_path, tree_map

PADDING_INDEX = -100
"""The padding of rows that are shorter than others: transformers' mark of an ignored label."""

GROWTH = 1.25
"""By how much an array grows where rows get longer: few copies, and little unused memory."""

BUFFER_BYTES = 256 * 2**20
"""How many bytes stay on an accelerator where the number of batches is not given."""


class PaddedRows:
    """The rows of one output over all batches.

    Args:
        total: how many rows there will be; None where that is not known, and then the array grows by doubling.
        allocator: allocates the array.

    >>> rows = PaddedRows(3)
    >>> rows.add(torch.tensor([[1, 2]])), rows.add(torch.tensor([[3], [4]]))
    (None, None)
    >>> rows.array().tolist()
    [[1, 2], [3, -100], [4, -100]]
    """

    def __init__(self, total: int | None = None, allocator: ArrayAllocator | None = None) -> None:
        self.total = total
        self.allocator = ArrayAllocator() if allocator is None else allocator
        self.count = 0
        self.shape: tuple[int, ...] = ()
        self.dtype: torch.dtype | None = None
        self.store: Array | None = None

    def add(self, values: Any) -> None:
        """Append the rows of a batch, a tensor or an array; one without dimensions is one row.

        Raises:
            BatchError: it has another number of dimensions than those before.
        """
        tensor = _as_tensor(values)
        shape, end = tuple(tensor.shape[1:]), self.count + tensor.shape[0]
        store = self._reserve(end, shape, tensor)
        window = store[self.count : end]
        if shape != store.shape[1:]:
            window[:] = _padding(self.dtype or tensor.dtype)
            window = window[_slices(shape)]
        if tensor.device.type == "cpu":
            window[:] = tensor.numpy()
        else:
            torch.from_numpy(window).copy_(tensor)
        self.count = end

    def array(self) -> Array:
        """All rows, padded with -100 where they differ in size; a view of what was allocated."""
        if self.store is None:
            raise BatchError("There are no outputs: no batch was added.")
        return self.store[: self.count][_slices(self.shape)]

    def _reserve(self, end: int, shape: tuple[int, ...], tensor: Tensor) -> Array:
        old = self.store
        if old is None or self.dtype is None:
            self.shape, self.dtype = shape, tensor.dtype
            self.store = self.allocator.allocate((max(end, self.total or 0), *shape), _numpy_dtype(tensor.dtype))
            return self.store
        if end <= len(old) and shape == old.shape[1:] == self.shape and tensor.dtype == self.dtype:
            return old  # nearly always
        if len(shape) != old.ndim - 1:
            known = ["examples", *self.shape]
            raise BatchError(f"An output has shape {list(tensor.shape)} in one batch and {known} in others: axes differ.")
        dtype = torch.promote_types(self.dtype, tensor.dtype)
        sizes = tuple(_grown(*pair) for pair in zip(shape, old.shape[1:], strict=True))
        if end > len(old) or sizes != old.shape[1:] or dtype != self.dtype:
            length = len(old) if end <= len(old) else max(end, 2 * len(old))
            self.store = self._reallocate(old, (length, *sizes), dtype)
        self.shape = tuple(max(pair) for pair in zip(shape, self.shape, strict=True))
        self.dtype = dtype
        assert self.store is not None
        return self.store

    def _reallocate(self, old: Array, shape: tuple[int, ...], dtype: torch.dtype) -> Array:
        new = self.allocator.allocate(shape, _numpy_dtype(dtype), replaces=old)
        if shape[1:] != old.shape[1:]:
            new[: self.count] = _padding(dtype)
        new[: self.count][_slices(old.shape[1:])] = old[: self.count]
        return new


class ConcatenatedOutputs:
    """Trees of outputs (a tensor, or tuples, lists and dictionaries of tensors), concatenated over all batches.

    Args:
        total: how many examples there will be; None where that is not known.
        allocator: allocates the arrays.

    >>> outputs = ConcatenatedOutputs()
    >>> outputs.add((torch.zeros(2, 3), {"a": torch.ones(2)}), 2)
    >>> outputs.arrays()[0].shape
    (2, 3)
    """

    def __init__(self, total: int | None = None, allocator: ArrayAllocator | None = None) -> None:
        self.total = total
        self.allocator = ArrayAllocator() if allocator is None else allocator
        self.tree: Any = None
        self.rows: dict[str, PaddedRows] | None = None

    def add(self, tree: Any, batch_size: int | None = None) -> None:
        """Append a batch's outputs; what is neither a tensor nor an array is left out.

        Args:
            tree: the outputs.
            batch_size: how many examples the batch has; an output may have several for each of them.

        Raises:
            BatchError: the batch has other outputs than the first one.
        """
        found = dict(tree_leaves_with_path(tree))
        if self.rows is None:
            self.tree = tree_map(lambda leaf: np.empty(0), tree)
            self.rows = {path: PaddedRows(self._total_of(leaf, batch_size), self.allocator) for path, leaf in found.items()}
        if found.keys() != self.rows.keys():
            raise BatchError(
                f"One batch gave the tensors {sorted(found) or 'none'}, the first one {sorted(self.rows) or 'none'}, so they "
                "cannot be concatenated. Let every batch have the same, or set eval_do_concat_batches=False."
            )
        for path, leaf in found.items():
            self.rows[path].add(leaf)

    def arrays(self) -> Any:
        """The same tree, of numpy arrays; None if no tree was added."""
        if self.rows is None:
            return None
        return _fill(self.tree, iter([rows.array() for rows in self.rows.values()]))

    def _total_of(self, leaf: Any, batch_size: int | None) -> int | None:
        own = leaf.shape[0] if leaf.ndim else None
        if self.total is None or not batch_size or own is None or own % batch_size:
            return None
        return self.total * int(own // batch_size)


class BatchedOutputs:
    """Trees of outputs of all batches: a list with an entry for each batch.

    >>> outputs = BatchedOutputs()
    >>> outputs.add({"labels": torch.zeros(2)}, 2), outputs.add({"labels": torch.zeros(1)}, 1)
    (None, None)
    >>> outputs.arrays()
    {'labels': [array([0., 0.], dtype=float32), array([0.], dtype=float32)]}
    """

    def __init__(self) -> None:
        self.trees: dict[str, list[Any]] = {}

    def add(self, tree: dict[str, Any], batch_size: int | None = None) -> None:
        """Append a batch's outputs by name."""
        for name, part in tree.items():
            self.trees.setdefault(name, []).append(tree_map(_copy, part))

    def arrays(self) -> dict[str, list[Any]]:
        """By name, an entry for each batch."""
        return self.trees


class DeviceBuffer:
    """Buffers outputs on their accelerator, so that it does not wait for each batch to be copied to the CPU.

    Args:
        write: is called with the outputs of each batch, in their order.
        batches: how many are buffered; None: as many as fit `BUFFER_BYTES`. On the CPU each is written at once.
        on_cpu: buffer outputs on the CPU, too.

    >>> buffer = DeviceBuffer(lambda tree, batch_size: print(tree, batch_size), batches=2, on_cpu=True)
    >>> buffer.add(torch.zeros(1), 1)
    >>> buffer.add(torch.ones(2), 2)
    tensor([0.]) 1
    tensor([1., 1.]) 2
    """

    def __init__(self, write: Callable[[Any, int | None], None], batches: int | None = None, *, on_cpu: bool = False) -> None:
        self.write = write
        self.batches = batches
        self.on_cpu = on_cpu
        self.pending: list[tuple[Any, int | None]] = []
        self.bytes = 0

    def add(self, tree: Any, batch_size: int | None = None) -> None:
        """Add the outputs of a batch, and write the buffer where it is full."""
        tensors = [leaf for _, leaf in tree_leaves_with_path(tree) if isinstance(leaf, Tensor)]
        if not self.on_cpu and all(tensor.device.type == "cpu" for tensor in tensors):
            self.flush()
            self.write(tree, batch_size)
            return
        # copies, because a compiled model may reuse its outputs' memory, and a slice would keep the memory of its base
        self.pending.append((tree_map(_clone, tree), batch_size))
        self.bytes += sum(tensor.nbytes for tensor in tensors)
        if len(self.pending) >= self.batches if self.batches is not None else self.bytes > BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        pending, self.pending, self.bytes = self.pending, [], 0
        for tree, batch_size in pending:
            self.write(tree, batch_size)


def _clone(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf.copy()


def _copy(leaf: Any) -> Array:
    tensor = _as_tensor(leaf, scalars=True)
    array: Array = tensor.clone().numpy() if isinstance(leaf, Tensor) and tensor.data_ptr() == leaf.data_ptr() else tensor.numpy()
    return array


def _as_tensor(values: Any, *, scalars: bool = False) -> Tensor:
    tensor = values.detach() if isinstance(values, Tensor) else torch.as_tensor(values)
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()  # numpy has no bfloat16, and metrics want the range
    if scalars:
        return tensor.cpu()
    return tensor if tensor.ndim else tensor.reshape(1)


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _grown(size: int, allocated: int) -> int:
    return allocated if size <= allocated else max(size, int(GROWTH * allocated))


def _slices(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return (slice(None), *(slice(size) for size in shape))


def _padding(dtype: torch.dtype) -> int:
    return PADDING_INDEX if dtype.is_signed else 0


def _fill(tree: Any, arrays: Iterator[Array]) -> Any:
    return tree_map(lambda _: next(arrays), tree)
