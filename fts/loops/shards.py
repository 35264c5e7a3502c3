"""Which of an epoch's batches a process takes, where several share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import attrs

from fts.loops.sampling import Indices, Order
from fts.steps.microbatches import MicroBatches, PaddingBatch, split_microbatches
from fts.typing import Batch

Item = TypeVar("Item")


class Place(NamedTuple):
    """A batch to fetch.

    Attributes:
        number: which of the epoch's batches it is, over all processes.
        indices: of its items.
        weightless: whether it only keeps this process in step with the others.
    """

    number: int
    indices: Indices
    weightless: bool = False


@attrs.frozen
class Part:
    """The part of an epoch's batches that one process takes.

    Batch number k of process r of R is number `k * R + r` of the epoch: each round of R batches has one for each process. Where
    the last round has fewer, the processes without one take a `PaddingBatch` copy.

    Args:
        rank: which process this is, from 0.
        size: how many there are.
        splits: instead, each batch is cut by rows into one part for each process.

    >>> list(Part(1, 2).of("abcde"))
    ['b', 'd', Weightless(batch='e')]
    """

    rank: int = 0
    size: int = 1
    splits: bool = False

    @property
    def stride(self) -> int:
        """How many of the epoch's batches a round has."""
        return 1 if self.splits else self.size

    def count(self, batches: int | None) -> int | None:
        """How many of so many batches each process takes, `PaddingBatch` ones included.

        >>> Part(0, 2).count(5)
        3
        """
        return None if batches is None else -(-batches // self.stride)

    def of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """This process's part of batches that are all read."""
        if self.size == 1:
            return iter(batches)
        return (shares[self.rank] for shares in self.shared(batches))

    def shared(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """What each process takes, round by round.

        >>> list(Part(0, 2).shared([1, 2, 3]))
        [[1, 2], [3, Weightless(batch=3)]]
        """
        rounds: Iterable[Iterable[Batch]]
        rounds = (split_microbatches(batch, self.size) for batch in batches) if self.splits else in_rounds(batches, self.size)
        for found in rounds:
            shares = list(found)
            yield shares + [PaddingBatch(shares[0])] * (self.size - len(shares))

    def places(self, order: Order, epoch: int, start: int) -> Iterator[Place]:
        """What this process fetches of an epoch from its own batch `start` on, of nothing but indices.

        Its `PaddingBatch` copies the batch before, so that it reads no examples of others; or the epoch's first.
        """
        if self.size == 1:
            return (Place(number, indices) for number, indices in enumerate(order(epoch, start), start))
        return self._cut(order, epoch, start) if self.splits else self._every(order, epoch, start)

    def _every(self, order: Order, epoch: int, start: int) -> Iterator[Place]:
        first = max(0, start - 1)
        before: Place | None = None
        for own, found in enumerate(in_rounds(order(epoch, first * self.size), self.size), first):
            if self.rank < len(found):
                place = before = Place(own * self.size + self.rank, found[self.rank])
            else:
                place = Place(own * self.size, found[0], True) if before is None else before._replace(weightless=True)
            if own >= start:
                yield place

    def _cut(self, order: Order, epoch: int, start: int) -> Iterator[Place]:
        for own, indices in enumerate(order(epoch, start), start):
            share = -(-len(indices) // self.size)
            mine = indices[self.rank * share : (self.rank + 1) * share]
            number = own * self.size + self.rank
            yield Place(number, mine) if len(mine) else Place(number, indices[:share], True)


WHOLE = Part()


def in_rounds(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` consecutive items, the last possibly shorter.

    >>> list(in_rounds("abc", 2))
    [['a', 'b'], ['c']]
    """
    iterator = iter(items)
    while found := list(islice(iterator, size)):
        yield found


def unwrapped(batch: Any) -> Any:
    """A batch, also of one that is `PaddingBatch`, or the first of several micro-batches.

    >>> unwrapped(PaddingBatch("a"))
    'a'
    """
    if isinstance(batch, MicroBatches):
        return unwrapped(batch[0]) if batch else batch
    return batch.batch if isinstance(batch, PaddingBatch) else batch
