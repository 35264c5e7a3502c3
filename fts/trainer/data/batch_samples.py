"""The micro-batches of updates that a user's `get_batch_samples` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import attrs
import torch

from fts.loops import Source
from fts.steps import MicroBatches, PaddingBatch
from fts.typing import Batch


class SampledBatches(MicroBatches):
    """The micro-batches of an update, with the `num_items_in_batch` that was counted in them.

    >>> SampledBatches([1, 2], 7).num_items_in_batch
    7
    """

    num_items_in_batch: Any

    def __new__(cls, samples: Iterable[Batch], num_items_in_batch: Any = None) -> SampledBatches:
        batches = super().__new__(cls, samples)
        batches.num_items_in_batch = num_items_in_batch
        return batches


class PaddingFilter(Iterator[Batch]):
    """An iterator over micro-batches that leaves out the padding batches, and keeps them for `take_padding`.

    >>> filtered = PaddingFilter(iter([1, PaddingBatch(2)]))
    >>> list(filtered), filtered.take_padding()
    ([1], [PaddingBatch(batch=2)])
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.padding: list[PaddingBatch] = []

    def __next__(self) -> Batch:
        batch = next(self.batches)
        while isinstance(batch, PaddingBatch):
            self.padding.append(batch)
            batch = next(self.batches)
        return batch

    def take_padding(self) -> list[PaddingBatch]:
        """The padding batches that were left out since the last call."""
        found, self.padding = self.padding, []
        return found


def with_batch_samples(
    source: Source,
    get_batch_samples: Callable[[Iterator[Any], int, torch.device], tuple[Any, Any]],
    device: torch.device,
) -> Source:
    """A source whose updates have the micro-batches that `get_batch_samples` takes from the iterator of an epoch.

    Args:
        source: has the micro-batches. `get_batch_samples` does not see padding batches; they are added to what it returns.
        get_batch_samples: `(epoch_iterator, num_batches, device) -> (micro-batches, num_items_in_batch)`; no micro-batch ends
            the epoch. Where the length of the data is known, `num_batches` is at most what is left.
        device: is passed on.
    """

    def batches(epoch: int, start: int, **options: Any) -> Iterator[Batch]:
        filtered = PaddingFilter(source.batches(epoch, start * source.micro_batches, **options))
        for num_batches in _micro_batch_counts(source, start):
            samples, num_items_in_batch = get_batch_samples(filtered, num_batches, device)
            samples = [*samples, *filtered.take_padding()]
            if not samples:
                return
            yield SampledBatches(samples, num_items_in_batch)

    return attrs.evolve(source, batches=batches, batches_per_epoch=source.steps_per_epoch, micro_batches=1)


def _micro_batch_counts(source: Source, start: int) -> Iterator[int]:
    """How many micro-batches each update of an epoch has, from `start` on; endless where the length of the data is unknown."""
    if source.batches_per_epoch is None:
        yield from repeat(source.micro_batches)
        return
    for taken in range(start * source.micro_batches, source.batches_per_epoch, source.micro_batches):
        yield min(source.micro_batches, source.batches_per_epoch - taken)
