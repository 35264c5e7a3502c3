"""Batches of updates that a user's `get_batch_samples` draws."""

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
    """The micro-batches of an update, with the number of items that was found in them.

    >>> SampledBatches([1, 2], 7).num_items_in_batch
    7
    """

    num_items_in_batch: Any

    def __new__(cls, samples: Iterable[Batch], num_items_in_batch: Any = None) -> SampledBatches:
        drawn = super().__new__(cls, samples)
        drawn.num_items_in_batch = num_items_in_batch
        return drawn


class PaddingFilter(Iterator[Batch]):
    """Micro-batches without the `PaddingBatch` ones, which are kept apart.

    >>> counted = PaddingFilter(iter([1, PaddingBatch(2)]))
    >>> list(shapes_from_counts), counted.taken_out()
    ([1], [Weightless(batch=2)])
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.apart: list[PaddingBatch] = []

    def __next__(self) -> Batch:
        batch = next(self.batches)
        while isinstance(batch, PaddingBatch):
            self.apart.append(batch)
            batch = next(self.batches)
        return batch

    def taken_out(self) -> list[PaddingBatch]:
        """Those that were come upon since this was asked last."""
        found, self.apart = self.apart, []
        return found


def with_batch_samples(
    draw: Callable[[Iterator[Any], int, torch.device], tuple[Any, Any]], source: Source, device: torch.device
) -> Source:
    """A source whose updates have what `draw` takes from the iterator of an epoch.

    Args:
        draw: `(epoch_iterator, num_batches, device) -> (micro-batches, number of items)`; no micro-batch ends the epoch. Where
            the data tells its length, it is asked only for what is left.
        source: gives the micro-batches. One that weighs nothing is not shown to `draw`, and is added to what it gives.
        device: is passed on.
    """

    def batches(epoch: int, start: int, **how: Any) -> Iterator[Batch]:
        counted = PaddingFilter(source.batches(epoch, start * source.micro_batches, **how))
        for wanted in _micro_batch_counts(source, start):
            samples, items = draw(counted, wanted, device)
            samples = [*samples, *counted.taken_out()]
            if not samples:
                return
            yield SampledBatches(samples, items)

    return attrs.evolve(source, batches=batches, batches_per_epoch=source.steps_per_epoch, micro_batches=1)


def _micro_batch_counts(source: Source, start: int) -> Iterator[int]:
    """How many micro-batches each update of an epoch has from one on; without end where the data does not tell."""
    if source.batches_per_epoch is None:
        yield from repeat(source.micro_batches)
        return
    for taken in range(start * source.micro_batches, source.batches_per_epoch, source.micro_batches):
        yield min(source.micro_batches, source.batches_per_epoch - taken)
