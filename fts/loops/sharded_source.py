"""A source whose batches several processes share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from fts.errors import ArgumentError, DataError
from fts.loops.sampling import Indices
from fts.loops.shards import Part
from fts.loops.source import Source
from fts.typing import Batch

if TYPE_CHECKING:
    from fts.distributed import Group


def shard_source(
    source: Source, rank: int, size: int, *, split_batches: bool = False, dispatch: bool = False, group: Group | None = None
) -> Source:
    """The part of a source that one of several processes takes.

    Batch number k of process r is number `k * size + r` of the epoch, with the items, the order and the random augmentation that
    it has there for one process: so a step has what it has on one process with `size` times as many micro-batches. Every process
    has as many of them in each step as every other; where an epoch's last step has fewer than there are places, those without
    one get a `fts.steps.PaddingBatch` copy.

    Of data with numbered items each process reads its own items alone. Data that can only be iterated are iterated by every
    process, which keeps its part; or, with `dispatch`, the first process reads them. In any case give the whole data, the same to
    each process. What is divided already would be divided once more. Where it is seen, it is refused: a
    `DistributedSampler`, accelerate's shards, a stream that `split_dataset_by_node` of Hugging Face `datasets` has cut; a part of
    a data set with numbered items cannot be told from a whole one.

    Args:
        source: the same in each process; not shared yet.
        rank: which process this is, from 0.
        size: how many there are.
        split_batches: instead, each batch is cut by rows into one part for each process, so that the batch size is that of all of
            them together. Random augmentation is then keyed by the part, and differs from that of one process.
        dispatch: the first process of `group` reads every batch and sends the others theirs.
        group: of the processes, for `dispatch`: that of `fts.distributed.init_process_group()` by default.

    Returns:
        A source.

    Raises:
        ArgumentError: the numbers cannot be those of processes, the source is shared already, or its batches cannot be cut
            into equal parts.
        DataError: the data are divided among processes already.

    >>> from fts import loops
    >>> numbers = loops.source(list(range(6)), batch_size=2)
    >>> [list(shard_source(numbers, rank, 2).epoch(0)) for rank in (0, 1)]
    [[tensor([0, 1]), tensor([4, 5])], [tensor([2, 3]), Weightless(batch=tensor([2, 3]))]]
    """
    _check(source, rank, size, split_batches)
    if size == 1:
        return source
    part = Part(rank, size, split_batches)

    def batches(epoch: int, start: int, **cursor: Any) -> Iterator[Batch]:
        if dispatch:
            return _dispatched(source, epoch, start, part, _started(size) if group is None else group, cursor)
        return source.batches(epoch, start, part=part, **cursor)

    def order(epoch: int, start: int) -> Iterator[Indices]:
        assert source.order is not None
        return (place.indices for place in part.places(source.order, epoch, start) if not place.weightless)

    numbered = source.order is not None and not (split_batches and source.batch_size is None)
    return attrs.evolve(
        source,
        batches=batches,
        batches_per_epoch=part.count(source.batches_per_epoch),
        batch_size=source.batch_size // size if split_batches and source.batch_size is not None else source.batch_size,
        order=order if numbered else None,
        part=part,
    )


def _check(source: Source, rank: int, size: int, split_batches: bool) -> None:
    if not 0 <= rank < size:
        raise ArgumentError(f"share(rank={rank!r}, size={size!r}): ranks go from 0 to size - 1.")
    if source.part.size > 1:
        raise ArgumentError(f"share was given a source that {source.part.size} processes share already.")
    if split_batches and source.batch_size is not None and source.batch_size % size:
        raise ArgumentError(
            f"split_batches=True cuts batches of {source.batch_size} rows for {size} processes: the batch size must be a "
            "multiple of their number."
        )
    if size > 1 and source.divided:
        raise DataError(
            f"The data, {source.kind}, are divided among processes already by {source.divided}, and would be divided twice. Give "
            "the whole data: each process takes its part by itself."
        )


def _started(size: int) -> Group:
    from fts.distributed import init_process_group

    group = init_process_group()
    if group.size != size:
        raise ArgumentError(
            f"share(size={size}, dispatch=True) needs the processes to send batches to; there are {group.size}. Call "
            "fts.distributed.init_process_group() under torchrun, or give their group."
        )
    return group


@attrs.frozen
class _Failed:
    """What the first process sends instead of batches that it could not read."""

    reason: str


@attrs.frozen
class _End:
    """What it sends after the last batch."""


def _dispatched(source: Source, epoch: int, start: int, part: Part, group: Group, cursor: dict[str, Any]) -> Iterator[Batch]:
    """This process's batches, which the first one of the group reads."""
    if not group.is_first:
        yield from _received(group)
        return
    rounds = part.shared(source.batches(epoch, start * part.stride, **cursor))
    while True:
        try:
            shares = next(rounds, None)
        except Exception as error:
            group.scatter([_Failed(f"{type(error).__name__}: {error}")] * part.size)
            raise
        own = group.scatter([_End()] * part.size if shares is None else shares)
        if shares is None:
            return
        yield own


def _received(group: Group) -> Iterator[Batch]:
    while not isinstance(batch := group.scatter(None), _End):
        if isinstance(batch, _Failed):
            raise DataError(f"The first process, which reads the data for all, could not: {batch.reason}")
        yield batch
