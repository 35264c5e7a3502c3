"""Data sets and steps that the loops' tests share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info


class RecordingDataset(Dataset[Tensor]):
    """Example i is i; every read is recorded."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.reads.append(int(index))
        return torch.tensor(float(index))


class AugmentedDataset(RecordingDataset):
    """Each example comes with a draw from each of the three generators."""

    def __getitem__(self, index: int) -> Tensor:
        self.reads.append(int(index))
        return torch.tensor([float(index), torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)


class GetItemsDataset(RecordingDataset):
    """Has `__getitems__` and counts its calls."""

    calls = 0

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        self.calls += 1
        return [self[index] for index in indices]


class NumberStream(IterableDataset[Tensor]):
    """0 ... count-1, divided over workers; shuffled by epoch if `set_epoch` was called; reads are recorded."""

    def __init__(self, count: int, *, sized: bool = False, random_examples: bool = False) -> None:
        self.count = count
        self.epochs: list[int] = []
        self.reads = 0
        self.random_examples = random_examples
        if sized:
            self.__class__ = SizedNumberStream

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        first, stride = (info.id, info.num_workers) if info is not None else (0, 1)
        epoch = self.epochs[-1] if self.epochs else 0
        for number in range(first, self.count, stride):
            self.reads += 1
            noise = random.random() + torch.rand(()).item() + np.random.rand() if self.random_examples else 0.0
            yield torch.tensor(1000.0 * epoch + number + noise, dtype=torch.float64)


class SizedNumberStream(NumberStream):
    def __len__(self) -> int:
        return self.count


@attrs.frozen
class Count:
    """A state that only counts and sums."""

    step: int = 0
    total: float = 0.0
    seed: int = 0


def add(state: Count, batch: Any) -> tuple[Count, dict[str, Tensor]]:
    """A step on `Count`: adds the batch's sum."""
    amount = torch.as_tensor(batch, dtype=torch.float64).sum()
    return attrs.evolve(state, step=state.step + 1, total=state.total + float(amount)), {"loss": amount}


def to_lists(batches: Any) -> list[Any]:
    """Batches as nested Python lists."""
    if isinstance(batches, Tensor):
        return batches.tolist()
    if isinstance(batches, dict):
        return {name: to_lists(value) for name, value in batches.items()}
    if isinstance(batches, (list, tuple)) or hasattr(batches, "__next__"):
        return [to_lists(batch) for batch in batches]
    return batches
