"""`source`: makes a `Source` of map-style datasets, iterable datasets, DataLoaders, lists and iterators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
from torch.utils.data import Dataset as TorchDataset, IterableDataset, default_collate

from fts.errors import ArgumentError, DataError
from fts.loops.dataloader_state import StateDict
from fts.loops.fetcher import (
    IterableDatasetFetcher,
    MapDatasetFetcher,
    Request,
    is_plain_tensor_dataset,
    may_use_randomness,
    tensor_dataset_batches,
)
from fts.loops.loader_options import (
    Collate,
    LoaderOptions,
    dataloader_kwargs,
    options_from_dataloader,
    sharded_by,
    unwrap_dataloader,
)
from fts.loops.sampling import EpochSampler, Order, batch_order, regular_order, sampled_order
from fts.loops.shards import UNSHARDED, Shard
from fts.loops.source import Source
from fts.loops.worker_pool import WorkerPool
from fts.randomness import DATA, fold_in
from fts.typing import Batch


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

    In epoch e, n shuffled examples are visited in the order of `torch.randperm(n)` under a CPU generator seeded with
    `seed + e`. While batch b is fetched (examples and collation, in any process), torch's, numpy's and Python's
    generators are seeded with `fold_in(seed, DATA, e, b)`. Skipping reads no data where examples can be indexed.

    Args:
        data: a map-style dataset; an iterable dataset (its `set_epoch` is called if it has one); a DataLoader, whose
            dataset, batch size, sampler, collate function and worker settings are used, also where accelerate has prepared it;
            or anything that can be iterated again and again and yields ready batches, such as a list. An iterator is good for
            one epoch.
        batch_size: examples in a batch. None: the data's elements are ready batches (a map-style dataset needs a size).
        shuffle: visit the examples (of a list without `batch_size`: the batches) in random order.
        seed: an integer of 64 bits.
        sampler: yields the indices of an epoch in its own order, instead of `shuffle`; its `set_epoch` is called if it has one.
            The order of an `EpochSampler` is that of the source's seed.
        collate: makes a batch of a list of examples; default `torch.utils.data.default_collate`. Without `batch_size`
            it is applied to each ready batch, if given.
        drop_last: leave out a last batch that is not full; needs a `batch_size`.
        workers: how many processes prefetch; 0 fetches in this one.
        micro_batches: how many consecutive batches make the `MicroBatches` of one step; an epoch's last may have fewer.
        **loading: the DataLoader's `pin_memory` (ignored without an accelerator), `prefetch_factor`,
            `persistent_workers`, `timeout`, `worker_init_fn`, `multiprocessing_context`, and `in_order` (False: a batch comes as
            soon as any worker has one, so the order is no longer reproducible).

    Returns:
        The source.

    Raises:
        ArgumentError: an argument has a value that cannot work.
        DataError: data of this kind cannot be used with these arguments.

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
    loader = unwrap_dataloader(data)
    if loader is not None:
        given = {"batch_size": batch_size, "shuffle": shuffle, "sampler": sampler, "collate": collate, "drop_last": drop_last}
        _raise_if_given(given | {"workers": workers} | loading)
        options = attrs.evolve(options_from_dataloader(loader, seed), micro_batches=micro_batches)
    else:
        if sampler is not None and shuffle:
            raise ArgumentError("source was given shuffle=True and a sampler. Give one of them: each sets the order.")
        if drop_last and batch_size is None:
            raise ArgumentError("source(drop_last=True) has no effect on ready batches. Give a batch_size, or leave it out.")
        if batch_size is not None and collate is None:
            collate = default_collate
        kwargs = dataloader_kwargs(workers, loading)
        options = LoaderOptions(
            data, batch_size, seed, shuffle, collate, drop_last, micro_batches, sampler, dataloader_kwargs=kwargs
        )
    return _source_of(options)


def _raise_if_given(given: dict[str, Any]) -> None:
    duplicates = [name for name, value in given.items() if value]
    if duplicates:
        raise ArgumentError(
            f"source was given a DataLoader and {', '.join(duplicates)}, which the DataLoader has already. Give them to the "
            "DataLoader, or give its dataset instead."
        )


def _source_of(options: LoaderOptions) -> Source:
    data = options.data
    if isinstance(data, Source):
        raise ArgumentError("source was given a Source. Use it as it is, or make another from the data.")
    if isinstance(data, Iterator):
        return _iterator_source(options)
    if _is_map_style(options):
        return _map_style_source(options)
    if isinstance(data, (Mapping, str, bytes)) or not isinstance(data, Iterable):
        raise DataError(
            f"Data of type {type(data).__name__} is neither a dataset nor an iterable of batches. Give a dataset, a DataLoader, "
            "or a list of batches" + (", such as one of the dictionary's values." if isinstance(data, Mapping) else ".")
        )
    if options.shuffle:
        raise DataError(
            f"Data of type {type(data).__name__} cannot be shuffled: it can only be iterated. Shuffle inside the dataset "
            "(in `__iter__`, after `set_epoch`), or give data with __getitem__ and __len__."
        )
    return _iterable_source(options)


def _is_map_style(options: LoaderOptions) -> bool:
    data, name = options.data, type(options.data).__name__
    if options.sampler is not None:
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
            raise DataError(f"A sampler was given with data of type {name}, whose examples have no index. Give it a __getitem__.")
        return True
    if isinstance(data, (IterableDataset, Mapping, str, bytes)) or not hasattr(data, "__getitem__"):
        return False
    if not hasattr(data, "__len__"):
        if isinstance(data, Iterable) and not isinstance(data, TorchDataset):
            return False
        raise DataError(f"A map-style dataset ({name}) needs __len__, for a random order of its examples.")
    map_style = isinstance(data, TorchDataset) or hasattr(data, "__getitems__") or not isinstance(data, Iterable)
    if map_style and not options.batched and not options.ready_batches:
        raise DataError(
            f"A map-style dataset ({name} with {len(data)} examples) needs a batch size: source(dataset, batch_size=32). "
            "Ready batches can be given as a list."
        )
    return True


def _map_style_source(options: LoaderOptions) -> Source:
    """Data whose examples have indices: a batch is fetched by its indices, and skipped without reading it."""
    data, sampler, seed = options.data, options.sampler, options.seed
    order, length = _order_of(options)
    fetcher = MapDatasetFetcher(data, options.collate, options.batched)
    is_random = may_use_randomness(data, options.collate)
    workers = WorkerPool(options.dataloader_kwargs) if options.dataloader_kwargs else None

    def requests(epoch: int, start: int, shard: Shard) -> Iterator[Request]:
        for number, indices, is_padding in shard.batch_indices(order, epoch, start):
            yield epoch, fold_in(seed, DATA, epoch, number) if is_random else None, indices, is_padding

    def fetched(epoch: int, start: int, shard: Shard) -> Iterator[Batch]:
        if workers is not None:
            return workers.fetch(fetcher, requests(epoch, start, shard), fold_in(seed, DATA, epoch))
        return map(fetcher.__getitem__, requests(epoch, start, shard))

    # not recursive: a function that refers to itself is a reference cycle, so its workers would be shut down late
    def batches(epoch: int, start: int, shard: Shard = UNSHARDED) -> Iterator[Batch]:
        if shard.split_batches and not options.batched:
            return shard.own_batches(fetched(epoch, start, UNSHARDED))
        return fetched(epoch, start, shard)

    def indexed_batches(epoch: int, start: int, shard: Shard = UNSHARDED) -> Iterator[Batch]:
        return tensor_dataset_batches(data.tensors, shard.batch_indices(order, epoch, start))

    # one indexing operation is faster than any worker
    own_order = sampler is None or isinstance(sampler, EpochSampler)
    pinned = options.dataloader_kwargs.get("pin_memory")
    fast = own_order and options.batched and is_plain_tensor_dataset(data, options.collate) and not pinned
    batch_size, num_examples, per_epoch = options.batch_size, length, _num_batches(length, options)
    if options.sampler_yields_batches:
        batch_size, num_examples, per_epoch = getattr(sampler, "batch_size", None), None, length
    return Source(
        indexed_batches if fast else batches,
        per_epoch,
        num_examples,
        batch_size,
        options.micro_batches,
        kind=f"a {type(data).__name__}",
        order=order,
        sharded_by=sharded_by(data, sampler),
        workers=workers,
    )


def _order_of(options: LoaderOptions) -> tuple[Order, int | None]:
    """The order of the batches of map-style data, and how many elements it has: examples, or batches of a batch sampler."""
    sampler, batch_size, seed, drop_last = options.sampler, options.batch_size, options.seed, options.drop_last
    if sampler is None:
        length = len(options.data)
        return regular_order(length, batch_size, shuffle=options.shuffle, seed=seed, drop_last=drop_last), length
    if isinstance(sampler, EpochSampler) and not options.sampler_yields_batches:
        return batch_order(sampler.order, len(sampler), batch_size, seed=seed, drop_last=drop_last), len(sampler)
    return sampled_order(sampler, batch_size, seed=seed, drop_last=drop_last), _length(sampler)


def _iterable_source(options: LoaderOptions) -> Source:
    """Data that can only be iterated: skipped examples are read."""
    data, seed = options.data, options.seed
    fetcher = IterableDatasetFetcher(options)
    workers = WorkerPool(options.dataloader_kwargs) if options.dataloader_kwargs else None
    num_workers = options.dataloader_kwargs.get("num_workers", 0)
    if num_workers > 1 and not isinstance(data, IterableDataset):
        raise ArgumentError(
            f"{num_workers} workers would each iterate all of a {type(data).__name__}, and every batch would come {num_workers} "
            "times. Use one worker, or a torch IterableDataset that divides its examples by torch.utils.data.get_worker_info()."
        )

    def batches(epoch: int, start: int, state_dict: StateDict | None = None, shard: Shard = UNSHARDED) -> Iterator[Batch]:
        start, per_step = start * shard.stride, options.micro_batches * shard.stride
        if workers is not None:
            return shard.own_batches(workers.stream(fetcher, epoch, start, state_dict, fold_in(seed, DATA, epoch), per_step))
        return shard.own_batches(fetcher.batches(epoch, start, state_dict, per_step))

    # with several workers the length depends on how they divide the examples
    length = _length(data) if num_workers <= 1 else None
    return Source(
        batches,
        _num_batches(length, options),
        None if options.batch_size is None else length,
        options.batch_size,
        options.micro_batches,
        kind=f"a {type(data).__name__}",
        stream_workers=max(1, num_workers),
        loader_state=fetcher.loader_state if fetcher.stateful or fetcher.loader_state.incomplete_reason else None,
        sharded_by=sharded_by(data),
        workers=workers,
    )


def _iterator_source(options: LoaderOptions) -> Source:
    """An iterator: one epoch, from its beginning."""
    kind = f"an iterator ({type(options.data).__name__})"
    if options.shuffle or options.sampler is not None:
        given = "shuffle=True" if options.shuffle else "a sampler"
        raise DataError(f"source was given {given} with {kind}, which has an order of its own. Give its elements as a list.")
    if options.dataloader_kwargs.get("num_workers"):
        raise ArgumentError("Workers cannot share an iterator: each would consume it. Use workers=0, or an IterableDataset.")
    fetcher = IterableDatasetFetcher(options)
    used = False

    def batches(epoch: int, start: int, shard: Shard = UNSHARDED) -> Iterator[Batch]:
        nonlocal used
        if used or epoch or start:
            raise DataError(
                f"Epoch {epoch} from batch {start} was requested of {kind}, which can be consumed only once, from its "
                "beginning. To train for several epochs or to resume, give data that can be iterated again: a list, a dataset, "
                "a DataLoader, or an object with __iter__."
            )
        used = True
        return shard.own_batches(fetcher.batches(epoch))

    return Source(batches, None, None, options.batch_size, options.micro_batches, kind)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # no __len__, or one that says so
        return None


def _num_batches(length: int | None, options: LoaderOptions) -> int | None:
    if length is None or options.batch_size is None:
        return length
    return length // options.batch_size if options.drop_last else -(-length // options.batch_size)
