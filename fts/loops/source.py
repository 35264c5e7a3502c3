"""Sources: any kind of data as numbered epochs of numbered batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import attrs
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset, IterableDataset, default_collate

from fts.errors import ArgumentError, DataError
from fts.loops.dataloader_state import Bookmark, Cursor, marks_of
from fts.loops.fetcher import Fetcher, Request, Stream, Workers, can_draw, has_rows, row_batches, too_short
from fts.loops.loader_options import Collate, Reading, divided_by, loading_options, reading_of, torch_loader
from fts.loops.position import Position
from fts.loops.sampling import EpochSampler, Order, batch_order, regular_order, sampled_order
from fts.loops.shards import WHOLE, Part, in_rounds
from fts.randomness import DATA, fold
from fts.steps.microbatches import MicroBatches
from fts.typing import Batch


@attrs.frozen
class Source:
    """Data as epochs of batches; made by `source`.

    Attributes:
        batches: `(epoch, start)` -> the loader's batches of that epoch from number `start` on; it may be given a `cursor`, too,
            where there is a bookmark, and by `shard_source` a `part`.
        batches_per_epoch: how many of those an epoch has; None where the data does not tell.
        num_items: how many items an epoch visits; None where the data does not tell.
        batch_size: items in one of those batches; None where they come ready.
        micro_batches: how many of them make the batch of one step.
        kind: what the data is, in words.
        shares: how many workers divide a stream among them, each cutting its share into batches; otherwise 1.
        order: `(epoch, start)` -> the indices of each loader's batch from number `start` on; None where items have none.
        bookmark: where a stream's iteration is; None where the data keeps no state.
        begin: the place of a cursor, and the cursor, if it was restored.
        part: what this process takes of the data's batches. Then all of the above but `num_items` and `shares` are of this part.
        divided: by what the data are divided among processes already; empty if by nothing that is known.
        workers: what fetches in other processes; None where none do.
    """

    batches: Callable[..., Iterator[Batch]] = attrs.field(repr=False)
    batches_per_epoch: int | None = None
    num_items: int | None = None
    batch_size: int | None = None
    micro_batches: int = 1
    kind: str = "data"
    shares: int = 1
    order: Order | None = attrs.field(default=None, repr=False)
    bookmark: Bookmark | None = attrs.field(default=None, repr=False)
    begin: tuple[Position, Cursor] | None = attrs.field(default=None, repr=False)
    part: Part = WHOLE
    divided: str = ""
    workers: Workers | None = attrs.field(default=None, repr=False)

    @property
    def steps_per_epoch(self) -> int | None:
        """How many steps an epoch has; None where the data does not tell."""
        return None if self.batches_per_epoch is None else -(-self.batches_per_epoch // self.micro_batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Args:
            epoch: which pass over the data, from 0.
            start: how many of the steps' batches to skip.

        Returns:
            An iterator of batches, each a `MicroBatches` if several make one step.

        Raises:
            DataError: the epoch is shorter than `start`, or the data can be iterated only once and was.

        >>> list(source([10, 11, 12]).epoch(0, start=1))
        [11, 12]
        """
        steps = self.steps_per_epoch
        if steps is not None and start > steps:
            raise too_short(start, steps)
        cursor = self.begin[1] if self.begin is not None and self.begin[0] == Position(epoch, start) else None
        found = self.batches(epoch, start * self.micro_batches, **({} if cursor is None else {"cursor": cursor}))
        return found if self.micro_batches == 1 else map(MicroBatches, in_rounds(found, self.micro_batches))

    def cursor(self, position: Position) -> Cursor | None:
        """Where a stream is, in the words of its `state_dict()`: what `restored` begins at without reading what was skipped.

        Args:
            position: of the next batch; it must be where the iteration of this source stands, as at the time when
                `loops.fit` saves.

        Returns:
            What JSON can hold, to keep as `save_checkpoint(..., extra={"data": ...})`; None where the data keeps no state, where
            the state is not all that decides what comes next, or where the iteration is elsewhere.

        >>> source([1, 2]).cursor(Position()) is None
        True
        """
        if self.bookmark is None:
            return None
        return self.bookmark.cursor(position.epoch, position.batch, self.micro_batches * self.part.stride)

    def restored(self, position: Position, cursor: Cursor | None) -> Source:
        """The same source, whose iteration from a position on begins at a cursor.

        Args:
            position: what the cursor is the place of, in batches of this source.
            cursor: what `cursor` gave; None to read what is skipped.

        Raises:
            CheckpointError: the cursor is damaged.
        """
        if cursor is None or self.bookmark is None:
            return self
        marks_of(cursor)
        if len(cursor["readers"]) != self.bookmark.readers:
            return self
        return attrs.evolve(self, begin=(position, cursor))

    def items(self, epoch: int, batch: int) -> list[Any] | None:
        """The indices of the items in a step's batch, without reading them.

        Args:
            epoch: which pass over the data, from 0.
            batch: which of the steps' batches, from 0.

        Returns:
            The indices; None where the items have none, as in a stream.

        >>> source(list(range(10)), batch_size=2, micro_batches=2).items(epoch=0, batch=1)
        [4, 5, 6, 7]
        """
        if self.order is None:
            return None
        found = islice(self.order(epoch, batch * self.micro_batches), self.micro_batches)
        parts = [part.tolist() if isinstance(part, Tensor) else part for part in found]
        return [index for part in parts for index in (part if isinstance(part, (list, tuple)) else [part])]

    def close(self) -> None:
        """End the workers that fetch, those that live from epoch to epoch too; the next epoch starts others.

        A source that is not closed ends them when it is collected, which may take Python's collector 5 s for each.

        >>> source(list(range(4)), batch_size=2).close()
        """
        if self.workers is not None:
            self.workers.close()

    def describe_empty(self, epoch: int) -> str:
        """Say that an epoch had no batch, with what is known about why."""
        items = "an unknown number of" if self.num_items is None else self.num_items
        size = "" if self.batch_size is None else f" and batches of {self.batch_size}"
        return (
            f"Epoch {epoch} of the data holds no batch: it is {self.kind} with {items} items{size}. Give data that is not empty; "
            "with drop_last=True there must be at least one full batch, and an iterator inside a dataset serves only one epoch."
        )


def source(
    data: Any,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    sampler: Iterable[Any] | None = None,
    collate: Collate | None = None,
    drop_last: bool = False,
    workers: int = 0,
    micro_batches: int = 1,
    **loading: Any,
) -> Source:
    """Make any kind of data a `Source`, whose order and random augmentation are functions of the seed and the epoch.

    In epoch e, n shuffled items are visited in the order of `torch.randperm(n)` under a CPU generator seeded with
    `seed + e`. While batch b is fetched (items and collation, in whichever process), torch's, numpy's and Python's
    generators are seeded with `fold(seed, DATA, e, b)`. Skipping reads no data where items can be indexed.

    Args:
        data: a map-style dataset; an iterable dataset (its `set_epoch` is called if it has one); a DataLoader, of which the
            dataset, batch size, sampler, collate function and worker settings are taken over, also where accelerate has
            prepared it; or anything that can be
            iterated again and again and gives ready batches, such as a list. An iterator serves one epoch.
        batch_size: items in a batch. None: the data's items are ready batches (a map-style dataset needs a size).
        shuffle: visit the items (of a list without `batch_size`: the batches) in random order.
        seed: an integer of 64 bits.
        sampler: gives the indices of an epoch in its own order, instead of `shuffle`; its `set_epoch` is called if it has one.
            An `EpochSampler` gives its order at the source's seed.
        collate: makes a batch of a list of items; default `torch.utils.data.default_collate`. Without `batch_size`
            it is applied to each ready batch, if given.
        drop_last: leave out a last batch that is not full; needs a `batch_size`.
        workers: how many processes fetch ahead; 0 fetches in this one.
        micro_batches: how many consecutive batches make the `MicroBatches` of one step; an epoch's last may have fewer.
        **loading: the DataLoader's `pin_memory` (nothing happens without an accelerator), `prefetch_factor`,
            `persistent_workers`, `timeout`, `worker_init_fn`, `multiprocessing_context`, and `in_order` (False: a batch comes as
            soon as any worker has one, so that the order is a function of nothing any more).

    Returns:
        The source.

    Raises:
        ArgumentError: an argument has a value that cannot work.
        DataError: the data is of no kind that can be used as asked.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> numbers = source(TensorDataset(torch.arange(5)), batch_size=2)
    >>> numbers.steps_per_epoch, list(numbers.epoch(0, start=1))
    (3, [[tensor([2, 3])], [tensor([4])]])
    """
    for name, value, least in (("micro_batches", micro_batches, 1), ("workers", workers, 0), ("batch_size", batch_size, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ArgumentError(f"source({name}={value!r}) must be a whole number of at least {least}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"source(seed={seed!r}) must be a whole number of at least -2**63 and below 2**63.")
    loader = torch_loader(data)
    if loader is not None:
        given = {"batch_size": batch_size, "shuffle": shuffle, "sampler": sampler, "collate": collate, "drop_last": drop_last}
        _refuse(given | {"workers": workers} | loading)
        reading = attrs.evolve(reading_of(loader, seed), micro_batches=micro_batches)
    else:
        if sampler is not None and shuffle:
            raise ArgumentError("source was given shuffle=True and a sampler. Give one of them: either decides the order.")
        if drop_last and batch_size is None:
            raise ArgumentError(
                "source(drop_last=True) does nothing to batches that come ready. Give a batch_size, or leave it out."
            )
        if batch_size is not None and collate is None:
            collate = default_collate
        options = loading_options(workers, loading)
        reading = Reading(data, batch_size, seed, shuffle, collate, drop_last, micro_batches, sampler, loading=options)
    return _read(reading)


def _refuse(given: dict[str, Any]) -> None:
    doubled = [name for name, value in given.items() if value]
    if doubled:
        raise ArgumentError(
            f"source was given a DataLoader and {', '.join(doubled)}, which the DataLoader says itself. Give them to the "
            "DataLoader, or give its dataset instead."
        )


def _read(reading: Reading) -> Source:
    data = reading.data
    if isinstance(data, Source):
        raise ArgumentError("source was given a Source. Use it as it is, or make another from the data.")
    if isinstance(data, Iterator):
        return _once(reading)
    if _is_indexable(reading):
        return _indexed(reading)
    if isinstance(data, (Mapping, str, bytes)) or not isinstance(data, Iterable):
        raise DataError(
            f"Data of type {type(data).__name__} is neither a dataset nor an iterable of batches. Give a dataset, a DataLoader, "
            "or a list of batches" + (", such as one of the dictionary's values." if isinstance(data, Mapping) else ".")
        )
    if reading.shuffle:
        raise DataError(
            f"Data of type {type(data).__name__} cannot be shuffled: it can only be iterated. Shuffle inside the dataset "
            "(in `__iter__`, after `set_epoch`), or give data with __getitem__ and __len__."
        )
    return _streamed(reading)


def _is_indexable(reading: Reading) -> bool:
    data, name = reading.data, type(reading.data).__name__
    if reading.sampler is not None:
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            raise DataError(f"A sampler was given with data of type {name}, which has no items by number. Give it a __getitem__.")
        return True
    if isinstance(data, (IterableDataset, Mapping, str, bytes)) or not hasattr(data, "__getitem__"):
        return False
    if not hasattr(data, "__len__"):
        if isinstance(data, Iterable) and not isinstance(data, TorchDataset):
            return False
        raise DataError(f"A map-style dataset ({name}) needs __len__, so that the order of its items can be drawn.")
    map_style = isinstance(data, TorchDataset) or hasattr(data, "__getitems__") or not isinstance(data, Iterable)
    if map_style and not reading.batched and not reading.items_are_batches:
        raise DataError(
            f"A map-style dataset ({name} with {len(data)} items) needs a batch size: source(dataset, batch_size=32). "
            "Ready batches can be given as a list."
        )
    return True


def _indexed(reading: Reading) -> Source:
    """Data whose items have numbers: a batch is fetched by the numbers of its items, and skipped without."""
    data, seed, collate, drop_last = reading.data, reading.seed, reading.collate, reading.drop_last
    if reading.sampler is None:
        items: int | None = len(data)
        order: Order = regular_order(len(data), reading.batch_size, shuffle=reading.shuffle, seed=seed, drop_last=drop_last)
    elif isinstance(reading.sampler, EpochSampler) and not reading.batched_sampler:
        items = len(reading.sampler)
        order = batch_order(reading.sampler.order, items, reading.batch_size, seed=seed, drop_last=drop_last)
    else:
        items = _length(reading.sampler)
        order = sampled_order(reading.sampler, reading.batch_size, seed=seed, drop_last=drop_last)
    fetcher = Fetcher(data, collate, reading.batched)
    draws = can_draw(data, collate)
    workers = Workers(reading.loading) if reading.loading else None

    def requests(epoch: int, start: int, part: Part) -> Iterator[Request]:
        for number, indices, weightless in part.places(order, epoch, start):
            yield epoch, fold(seed, DATA, epoch, number) if draws else None, indices, weightless

    def fetched(epoch: int, start: int, part: Part) -> Iterator[Batch]:
        if workers is not None:
            return workers.fetch(fetcher, requests(epoch, start, part), fold(seed, DATA, epoch))
        return map(fetcher.__getitem__, requests(epoch, start, part))

    # no function that calls itself: it would be a cycle, and workers that are left to the collector end late
    def batches(epoch: int, start: int, part: Part = WHOLE) -> Iterator[Batch]:
        if part.splits and not reading.batched:
            return part.of(fetched(epoch, start, WHOLE))
        return fetched(epoch, start, part)

    def rows(epoch: int, start: int, part: Part = WHOLE) -> Iterator[Batch]:
        return row_batches(data.tensors, part.places(order, epoch, start))

    # one indexing operation is faster than any worker
    ours = reading.sampler is None or isinstance(reading.sampler, EpochSampler)
    simple = ours and reading.batched and has_rows(data, collate) and not reading.loading.get("pin_memory")
    if reading.batched_sampler:
        size, num_items, per_epoch = getattr(reading.sampler, "batch_size", None), None, items
    else:
        size, num_items, per_epoch = reading.batch_size, items, _batches(items, reading)
    kind = f"a {type(data).__name__}"
    divided = divided_by(data, reading.sampler)
    found = rows if simple else batches
    return Source(found, per_epoch, num_items, size, reading.micro_batches, kind, order=order, divided=divided, workers=workers)


def _streamed(reading: Reading) -> Source:
    """Data that can only be iterated: what is skipped is consumed."""
    data, seed = reading.data, reading.seed
    stream = Stream(reading)
    workers = Workers(reading.loading) if reading.loading else None
    count = reading.loading.get("num_workers", 0)
    if count > 1 and not isinstance(data, IterableDataset):
        raise ArgumentError(
            f"{count} workers would each iterate the whole of a {type(data).__name__}, and every batch would come {count} times. "
            "Use one worker, or a torch IterableDataset that divides its items by torch.utils.data.get_worker_info()."
        )

    def batches(epoch: int, start: int, cursor: Cursor | None = None, part: Part = WHOLE) -> Iterator[Batch]:
        start, per_step = start * part.stride, reading.micro_batches * part.stride
        if workers is not None:
            return part.of(workers.stream(stream, epoch, start, cursor, fold(seed, DATA, epoch), per_step))
        return part.of(stream.batches(epoch, start, cursor, per_step))

    # with several workers the length depends on how they divide the items
    items = _length(data) if count <= 1 else None
    num_items = None if reading.batch_size is None else items
    return Source(
        batches,
        _batches(items, reading),
        num_items,
        reading.batch_size,
        reading.micro_batches,
        kind=f"a {type(data).__name__}",
        shares=max(1, count),
        bookmark=stream.bookmark if stream.stateful or stream.bookmark.reason else None,
        divided=divided_by(data),
        workers=workers,
    )


def _once(reading: Reading) -> Source:
    """An iterator: one epoch from its beginning, and no second."""
    if reading.shuffle or reading.sampler is not None:
        given = "shuffle=True" if reading.shuffle else "a sampler"
        raise DataError(
            f"source was given {given} with an iterator ({type(reading.data).__name__}), which comes in an order of its own. "
            "Give its items as a list."
        )
    if reading.loading.get("num_workers"):
        raise ArgumentError("Workers cannot share an iterator: each would consume it. Use workers=0, or an IterableDataset.")
    stream = Stream(reading)
    used = False

    def batches(epoch: int, start: int, part: Part = WHOLE) -> Iterator[Batch]:
        nonlocal used
        if used or epoch or start:
            raise DataError(
                f"Epoch {epoch} from batch {start} was asked of an iterator ({type(reading.data).__name__}), which can be "
                "consumed only once, from its beginning. To train for several epochs or to resume, give data that can be "
                "iterated again: a list, a dataset, a DataLoader, or an object with __iter__."
            )
        used = True
        return part.of(stream.batches(epoch))

    kind = f"an iterator ({type(reading.data).__name__})"
    return Source(batches, None, None, reading.batch_size, reading.micro_batches, kind)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # no __len__, or one that says so
        return None


def _batches(items: int | None, reading: Reading) -> int | None:
    if items is None or reading.batch_size is None:
        return items
    return items // reading.batch_size if reading.drop_last else -(-items // reading.batch_size)
