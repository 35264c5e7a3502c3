"""Allocation of large arrays: in memory, or in temporary files."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from fts.errors import DataError

GIB = 2**30
Array = np.ndarray[Any, Any]


@attrs.define
class ArrayAllocator:
    """Allocates arrays: in memory up to a limit for all of them, beyond it in memory-mapped temporary files.

    A file has no name, and is deleted with the last array that uses it.

    Args:
        limit: bytes in memory; None: half of what is free when the first array is allocated.
        directory: where files are made; None: the system's directory for temporary files (`TMPDIR`).

    >>> allocator = ArrayAllocator(limit=1000)
    >>> small, large = allocator.allocate((10,), "float32"), allocator.allocate((1000,), "float32")
    >>> allocator.in_memory, large.shape
    (40, (1000,))
    """

    limit: int | None = None
    directory: str | Path | None = None
    in_memory: int = attrs.field(default=0, init=False)

    def allocate(self, shape: tuple[int, ...], dtype: Any, replaces: Array | None = None) -> Array:
        """An uninitialized array.

        Args:
            shape: its shape.
            dtype: numpy's.
            replaces: an array that this one replaces.

        Raises:
            DataError: the disk is too small for its file.
        """
        if self.limit is None:
            self.limit = available_memory() // 2
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > 0 and self.in_memory + size > self.limit:
            return _memory_mapped(shape, dtype, size, self.directory)
        self.in_memory += size - (replaces.nbytes if replaces is not None and replaces.base is None else 0)
        return np.empty(shape, dtype)


def available_memory() -> int:
    """How many bytes this process can still allocate: on the machine, or in its container if that has less; 8 GiB if unknown."""
    try:
        import psutil  # accelerate brings it
    except ImportError:
        return 8 * GIB
    return min(int(psutil.virtual_memory().available), _container_memory_left())


def _container_memory_left(directory: Path = Path("/sys/fs/cgroup")) -> int:
    try:
        limit, current = ((directory / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no container, or of another kind
        return 2**62
    return 2**62 if limit == "max" else max(0, int(limit) - int(current))


def _memory_mapped(shape: tuple[int, ...], dtype: Any, size: int, directory: str | Path | None) -> Array:
    place = tempfile.gettempdir() if directory is None else directory
    free = shutil.disk_usage(place).free
    if free < size:  # writing to a mapped file on a full disk would kill the process
        raise DataError(
            f"Predictions of {size / GIB:.1f} GiB are too large for memory, and {place} has {free / GIB:.1f} GiB free for a "
            "file. Set TMPDIR to a larger disk, reduce them by preprocess_logits_for_metrics, or use batch_eval_metrics=True."
        )
    with tempfile.TemporaryFile(dir=place) as file:
        return np.asarray(np.memmap(file, dtype, mode="w+", shape=shape))
