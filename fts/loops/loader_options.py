"""How data is to be read, from the arguments of `source` or from a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import attrs
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from fts.errors import ArgumentError

Collate: TypeAlias = Callable[[Any], Any]

_FOR_WORKERS = ("timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor", "persistent_workers", "in_order")
_LOADING = ("pin_memory", *_FOR_WORKERS)


@attrs.frozen
class Reading:
    """The arguments of `source`, and what only a DataLoader can say.

    Attributes:
        data: what to read.
        batch_size: items in a batch; None where the data's items, or the sampler's batches, are taken as they come.
        seed: the seed of the order and of the fetches.
        shuffle: whether items are visited in random order.
        collate: called with the items of a batch, or with a ready batch; None leaves them as they are.
        drop_last: leave out a last batch that is not full.
        micro_batches: how many batches make one step.
        sampler: gives indices, or lists of them if `batched_sampler`; None where the order is ours.
        batched_sampler: whether each item of `sampler` is a batch.
        items_are_batches: whether a map-style dataset without a batch size is meant to hold ready batches.
        loading: arguments of a DataLoader about workers and pinned memory; empty to fetch in this process.
    """

    data: Any
    batch_size: int | None = None
    seed: int = 0
    shuffle: bool = False
    collate: Collate | None = None
    drop_last: bool = False
    micro_batches: int = 1
    sampler: Iterable[Any] | None = None
    batched_sampler: bool = False
    items_are_batches: bool = False
    loading: dict[str, Any] = attrs.Factory(dict)

    @property
    def batched(self) -> bool:
        """Whether a fetch asks for several items."""
        return self.batch_size is not None or self.batched_sampler


def torch_loader(data: Any) -> DataLoader[Any] | None:
    """The torch DataLoader whose batches some data gives; None where it is no loader, or iterates in a way of its own.

    accelerate's loader of one process's batches does no more than to place what the loader in it gives; a class of ours that
    does the same says so by `places_only`.

    >>> torch_loader(DataLoader(range(2))) is not None, torch_loader([1, 2]) is None
    (True, True)
    """
    if type(data).__module__ == "accelerate.data_loader" and type(data).__name__ == "DataLoaderShard":
        return None if data.skip_batches else torch_loader(data.base_dataloader)
    if not isinstance(data, DataLoader):
        return None
    plain = type(data).__iter__ is DataLoader.__iter__ or getattr(type(data), "places_only", False)
    return data if plain else None


def reading_of(loader: DataLoader[Any], seed: int) -> Reading:
    """Take over what a DataLoader was made with.

    Args:
        loader: a DataLoader that iterates as torch's own does.
        seed: the seed of the order and of the fetches; the loader's generator plays no part.

    Returns:
        How to read the same batches; shuffled ones in the order that `seed` gives.

    >>> reading = reading_of(DataLoader(range(8), batch_size=4, shuffle=True), seed=0)
    >>> reading.batch_size, reading.shuffle
    (4, True)
    """
    common: dict[str, Any] = {
        "data": loader.dataset,
        "seed": seed,
        "collate": loader.collate_fn,
        "loading": loading_options(loader.num_workers, _loading_of(loader)),
        "items_are_batches": loader.batch_size is None,
    }
    if isinstance(loader.dataset, IterableDataset):
        return Reading(batch_size=loader.batch_size, drop_last=loader.drop_last, **common)
    if loader.batch_sampler is None:
        return Reading(**common, **_sampling_of(loader.sampler, loader.dataset))
    if type(loader.batch_sampler) is BatchSampler:
        inner = loader.batch_sampler
        sampling = _sampling_of(inner.sampler, loader.dataset)
        return Reading(batch_size=inner.batch_size, drop_last=inner.drop_last, **common, **sampling)
    return Reading(sampler=loader.batch_sampler, batched_sampler=True, **common)


def divided_by(data: Any, sampler: Any = None) -> str:
    """What has divided data among processes; empty if nothing that is known.

    Args:
        data: which are read, or a loader that gives batches in its own way.
        sampler: of their items or batches, if there is one.

    >>> divided_by([1, 2])
    ''
    >>> divided_by([1, 2], DistributedSampler([1, 2], num_replicas=2, rank=0))
    'its DistributedSampler'
    """
    sampler = getattr(data, "sampler", None) if sampler is None else sampler
    for part in (sampler, getattr(sampler, "sampler", None)):
        if isinstance(part, DistributedSampler) and part.num_replicas > 1:
            return "its DistributedSampler"
    for part in (data, sampler):
        if type(part).__name__ in ("BatchSamplerShard", "IterableDatasetShard") and part.num_processes > 1:
            return f"accelerate's {type(part).__name__}"
    inner = getattr(data, "data", data)  # of one that only makes a torch dataset of it
    return "split_dataset_by_node of datasets" if getattr(inner, "_distributed", None) is not None else ""


def _sampling_of(sampler: Any, dataset: Any) -> dict[str, Any]:
    """The two usual samplers in words; any other as it is."""
    if type(sampler) is SequentialSampler and len(sampler) == len(dataset):
        return {}
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset):
        return {"shuffle": True}
    return {"sampler": sampler}


def loading_options(workers: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a DataLoader must be told to fetch as asked; empty where this process can simply fetch itself.

    Args:
        workers: how many processes fetch.
        given: further arguments by name.

    Returns:
        Arguments of `torch.utils.data.DataLoader`.

    Raises:
        ArgumentError: an argument is unknown, or needs workers and there are none.
    """
    options = {name: value for name, value in given.items() if (not value if name == "in_order" else value)}
    unknown = sorted(given.keys() - set(_LOADING))
    if unknown:
        raise ArgumentError(f"source has no argument {', '.join(unknown)}. About loading it has workers, {', '.join(_LOADING)}.")
    if not torch.accelerator.is_available():
        options.pop("pin_memory", None)
    if workers:
        return options | {"num_workers": workers}
    needless = sorted(options.keys() - {"pin_memory"})
    if needless:
        raise ArgumentError(f"source(workers=0) was given {', '.join(needless)}, which only workers can use. Give workers=1.")
    return options


def _loading_of(loader: DataLoader[Any]) -> dict[str, Any]:
    names = _LOADING if loader.num_workers else ("pin_memory",)
    return {name: getattr(loader, name, None) for name in names}
