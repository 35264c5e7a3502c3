"""A source that is sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from fts.distributed.process_group import Group, init_process_group
from fts.errors import ArgumentError, DataError
from fts.loops.sampling import Indices
from fts.loops.shards import Shard
from fts.loops.source import Source
from fts.typing import Batch


def shard_source(
    source: Source, rank: int, world_size: int, *, split_batches: bool = False, dispatch: bool = False, group: Group | None = None
) -> Source:
    """One process's shard of a source.

    Batch number k of process r is number `k * world_size + r` of the epoch, with the examples, the order and the random
    augmentation that it has there in one process: so a step equals that of one process with `world_size` times as many
    micro-batches. All processes have equally many in each step; where an epoch's last step has fewer batches than there are
    processes, those without one get a `fts.steps.PaddingBatch` copy.

    Of data with indices each process reads its own examples alone. Data that can only be iterated are iterated by every process,
    which keeps its batches; or, with `dispatch`, the first process reads them. In any case give the full data, the same to each
    process. Data that is sharded already would be sharded twice. Where that can be seen, it is an error: a `DistributedSampler`,
    accelerate's shards, a stream sharded by `split_dataset_by_node` of Hugging Face `datasets`. A part of a map-style data set
    cannot be distinguished from a full one.

    Args:
        source: the same in each process; not sharded yet.
        rank: of this process, from 0.
        world_size: the number of processes.
        split_batches: instead, each batch is split into one part for each process, so that the batch size is that of all of them
            in sum. Random augmentation is then keyed by the part, and differs from that of one process.
        dispatch: the first process of `group` reads every batch and sends the others theirs.
        group: of the processes, for `dispatch`: that of `fts.distributed.init_process_group()` by default.

    Returns:
        A source.

    Raises:
        ArgumentError: the rank is not below the world size, the source is sharded already, or its batches cannot be split into
            equal parts.
        DataError: the data is sharded over processes already.

    >>> from fts import loops
    >>> numbers = loops.source(list(range(6)), batch_size=2)
    >>> [list(shard_source(numbers, rank, 2).epoch(0)) for rank in (0, 1)]
    [[tensor([0, 1]), tensor([4, 5])], [tensor([2, 3]), PaddingBatch(batch=tensor([2, 3]))]]
    """
    _check(source, rank, world_size, split_batches)
    if world_size == 1:
        return source
    shard = Shard(rank, world_size, split_batches)

    def batches(epoch: int, start: int, **state_dict: Any) -> Iterator[Batch]:
        if dispatch:
            return _dispatched(source, epoch, start, shard, _default_group(world_size) if group is None else group, state_dict)
        return source.batches(epoch, start, shard=shard, **state_dict)

    def order(epoch: int, start: int) -> Iterator[Indices]:
        assert source.order is not None
        return (one.indices for one in shard.batch_indices(source.order, epoch, start) if not one.is_padding)

    has_order = source.order is not None and not (split_batches and source.batch_size is None)
    return attrs.evolve(
        source,
        batches=batches,
        batches_per_epoch=shard.num_batches(source.batches_per_epoch),
        batch_size=source.batch_size // world_size if split_batches and source.batch_size is not None else source.batch_size,
        order=order if has_order else None,
        shard=shard,
    )


def _check(source: Source, rank: int, world_size: int, split_batches: bool) -> None:
    if not 0 <= rank < world_size:
        raise ArgumentError(f"shard_source(rank={rank!r}, world_size={world_size!r}): ranks go from 0 to world_size - 1.")
    if source.shard.world_size > 1:
        raise ArgumentError(f"shard_source was given a source that is sharded over {source.shard.world_size} processes already.")
    if split_batches and source.batch_size is not None and source.batch_size % world_size:
        raise ArgumentError(
            f"split_batches=True splits batches of {source.batch_size} examples over {world_size} processes: the batch size must "
            "be a multiple of their number."
        )
    if world_size > 1 and source.sharded_by:
        raise DataError(
            f"The data, {source.kind}, is sharded over processes already by {source.sharded_by}, and would be sharded twice. "
            "Give the full data: each process takes its shard by itself."
        )


def _default_group(world_size: int) -> Group:
    group = init_process_group()
    if group.size != world_size:
        raise ArgumentError(
            f"shard_source(world_size={world_size}, dispatch=True) needs a group of so many processes; there are {group.size}. "
            "Call fts.distributed.init_process_group() under torchrun, or give their group."
        )
    return group


@attrs.frozen
class _Failed:
    """What the first process sends instead of batches that it could not read."""

    reason: str


@attrs.frozen
class _End:
    """What it sends after the last batch."""


def _dispatched(
    source: Source, epoch: int, start: int, shard: Shard, group: Group, state_dict: dict[str, Any]
) -> Iterator[Batch]:
    """This process's batches, which the first one of the group reads."""
    if not group.is_main_process:
        yield from _received(group)
        return
    rounds = shard.rounds(source.batches(epoch, start * shard.stride, **state_dict))
    while True:
        try:
            shares = next(rounds, None)
        except Exception as error:
            group.scatter_object([_Failed(f"{type(error).__name__}: {error}")] * shard.world_size)
            raise
        own = group.scatter_object([_End()] * shard.world_size if shares is None else shares)
        if shares is None:
            return
        yield own


def _received(group: Group) -> Iterator[Batch]:
    while not isinstance(batch := group.scatter_object(None), _End):
        if isinstance(batch, _Failed):
            raise DataError(f"The first process, which reads the data for all, failed: {batch.reason}")
        yield batch
