"""Which of an epoch's batches each process takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import attrs

from fts.loops.sampling import Indices, Order
from fts.steps.microbatches import MicroBatches, PaddingBatch, split_microbatches
from fts.typing import Batch

Item = TypeVar("Item")


class BatchIndices(NamedTuple):
    """A batch to fetch.

    Attributes:
        number: which of the epoch's batches it is, over all processes.
        indices: of its examples.
        is_padding: whether it only keeps this process in step with the others.
    """

    number: int
    indices: Indices
    is_padding: bool = False


@attrs.frozen
class Shard:
    """One process's shard of an epoch's batches.

    Batch number k of process r of R is number `k * R + r` of the epoch: each round of R batches has one for each process. Where
    the last round has fewer, the processes without one take a `PaddingBatch` copy.

    Args:
        rank: of this process, from 0.
        world_size: the number of processes.
        split_batches: instead, each batch is split into one part for each process.

    >>> list(Shard(1, 2).own_batches("abcde"))
    ['b', 'd', PaddingBatch(batch='e')]
    """

    rank: int = 0
    world_size: int = 1
    split_batches: bool = False

    @property
    def stride(self) -> int:
        """How many of the epoch's batches a round has."""
        return 1 if self.split_batches else self.world_size

    def num_batches(self, batches: int | None) -> int | None:
        """How many of so many batches each process takes, `PaddingBatch` ones included.

        >>> Shard(0, 2).num_batches(5)
        3
        """
        return None if batches is None else -(-batches // self.stride)

    def own_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """This process's batches, of all batches that are read."""
        if self.world_size == 1:
            return iter(batches)
        return (shares[self.rank] for shares in self.rounds(batches))

    def rounds(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """What each process takes, round by round.

        >>> list(Shard(0, 2).rounds([1, 2, 3]))
        [[1, 2], [3, PaddingBatch(batch=3)]]
        """
        rounds: Iterable[Iterable[Batch]]
        if self.split_batches:
            rounds = (split_microbatches(batch, self.world_size) for batch in batches)
        else:
            rounds = batched(batches, self.world_size)
        for found in rounds:
            shares = list(found)
            yield shares + [PaddingBatch(shares[0])] * (self.world_size - len(shares))

    def batch_indices(self, order: Order, epoch: int, start: int) -> Iterator[BatchIndices]:
        """The indices that this process fetches in an epoch, from its own batch `start` on.

        Its `PaddingBatch` copies the batch before, so that it reads no examples of other processes; or the epoch's first.
        """
        if self.world_size == 1:
            return (BatchIndices(number, indices) for number, indices in enumerate(order(epoch, start), start))
        return self._split(order, epoch, start) if self.split_batches else self._interleaved(order, epoch, start)

    def _interleaved(self, order: Order, epoch: int, start: int) -> Iterator[BatchIndices]:
        first = max(0, start - 1)
        before: BatchIndices | None = None
        for own, found in enumerate(batched(order(epoch, first * self.world_size), self.world_size), first):
            if self.rank < len(found):
                one = before = BatchIndices(own * self.world_size + self.rank, found[self.rank])
            else:
                one = BatchIndices(own * self.world_size, found[0], True) if before is None else before._replace(is_padding=True)
            if own >= start:
                yield one

    def _split(self, order: Order, epoch: int, start: int) -> Iterator[BatchIndices]:
        for own, indices in enumerate(order(epoch, start), start):
            size = -(-len(indices) // self.world_size)
            mine = indices[self.rank * size : (self.rank + 1) * size]
            number = own * self.world_size + self.rank
            yield BatchIndices(number, mine) if len(mine) else BatchIndices(number, indices[:size], True)


UNSHARDED = Shard()


def batched(iterable: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` consecutive elements, the last possibly shorter: `itertools.batched` of Python 3.12.

    >>> list(batched("abc", 2))
    [['a', 'b'], ['c']]
    """
    iterator = iter(iterable)
    while found := list(islice(iterator, size)):
        yield found


def unwrap_batch(batch: Any) -> Any:
    """A batch without its `PaddingBatch`, or the first of several micro-batches.

    >>> unwrap_batch(PaddingBatch("a"))
    'a'
    """
    if isinstance(batch, MicroBatches):
        return unwrap_batch(batch[0]) if batch else batch
    return batch.batch if isinstance(batch, PaddingBatch) else batch
