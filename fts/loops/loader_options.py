"""How a source reads its data: options from the arguments of `source` or from a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import attrs
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from fts.errors import ArgumentError

Collate: TypeAlias = Callable[[Any], Any]

_FOR_WORKERS = ("timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor", "persistent_workers", "in_order")
_DATALOADER_KWARGS = ("pin_memory", *_FOR_WORKERS)


@attrs.frozen
class LoaderOptions:
    """The arguments of `source`, and options that only a DataLoader has.

    Attributes:
        data: what to read.
        batch_size: examples in a batch; None where the data's elements, or the sampler's batches, are taken as they come.
        seed: the seed of the order and of the fetches.
        shuffle: whether examples are visited in random order.
        collate: called with the examples of a batch, or with a ready batch; None leaves them as they are.
        drop_last: leave out a last batch that is not full.
        micro_batches: how many batches make one step.
        sampler: yields indices, or lists of them if `sampler_yields_batches`; None for the order of the source.
        sampler_yields_batches: whether each element of `sampler` is a batch.
        ready_batches: whether a map-style dataset without a batch size may hold ready batches.
        dataloader_kwargs: arguments of a DataLoader about workers and pinned memory; empty to fetch in this process.
    """

    data: Any
    batch_size: int | None = None
    seed: int = 0
    shuffle: bool = False
    collate: Collate | None = None
    drop_last: bool = False
    micro_batches: int = 1
    sampler: Iterable[Any] | None = None
    sampler_yields_batches: bool = False
    ready_batches: bool = False
    dataloader_kwargs: dict[str, Any] = attrs.Factory(dict)

    @property
    def batched(self) -> bool:
        """Whether a fetch asks for several examples."""
        return self.batch_size is not None or self.sampler_yields_batches


def unwrap_dataloader(data: Any) -> DataLoader[Any] | None:
    """The torch DataLoader whose batches some data yields; None where it is no loader, or has an iteration of its own.

    accelerate's DataLoaderShard of one process only moves the batches of the loader in it to a device; a subclass that does the
    same sets `only_moves_batches`.

    >>> unwrap_dataloader(DataLoader(range(2))) is not None, unwrap_dataloader([1, 2]) is None
    (True, True)
    """
    if type(data).__module__ == "accelerate.data_loader" and type(data).__name__ == "DataLoaderShard":
        return None if data.skip_batches else unwrap_dataloader(data.base_dataloader)
    if not isinstance(data, DataLoader):
        return None
    plain = type(data).__iter__ is DataLoader.__iter__ or getattr(type(data), "only_moves_batches", False)
    return data if plain else None


def options_from_dataloader(loader: DataLoader[Any], seed: int) -> LoaderOptions:
    """The options that a DataLoader was made with.

    Args:
        loader: a DataLoader that iterates as torch's own does.
        seed: the seed of the order and of the fetches; the loader's generator is not used.

    Returns:
        Options that read the same batches; shuffled ones in the order of `seed`.

    >>> options = options_from_dataloader(DataLoader(range(8), batch_size=4, shuffle=True), seed=0)
    >>> options.batch_size, options.shuffle
    (4, True)
    """
    common: dict[str, Any] = {
        "data": loader.dataset,
        "seed": seed,
        "collate": loader.collate_fn,
        "dataloader_kwargs": dataloader_kwargs(loader.num_workers, _kwargs_of(loader)),
        "ready_batches": loader.batch_size is None,
    }
    if isinstance(loader.dataset, IterableDataset):
        return LoaderOptions(batch_size=loader.batch_size, drop_last=loader.drop_last, **common)
    if loader.batch_sampler is None:
        return LoaderOptions(**common, **_sampling_of(loader.sampler, loader.dataset))
    if type(loader.batch_sampler) is BatchSampler:
        inner = loader.batch_sampler
        sampling = _sampling_of(inner.sampler, loader.dataset)
        return LoaderOptions(batch_size=inner.batch_size, drop_last=inner.drop_last, **common, **sampling)
    return LoaderOptions(sampler=loader.batch_sampler, sampler_yields_batches=True, **common)


def sharded_by(data: Any, sampler: Any = None) -> str:
    """What has sharded data over processes; empty if nothing known has.

    Args:
        data: examples, or a loader with an iteration of its own.
        sampler: of their examples or batches, if there is one.

    >>> sharded_by([1, 2])
    ''
    >>> sharded_by([1, 2], DistributedSampler([1, 2], num_replicas=2, rank=0))
    'its DistributedSampler'
    """
    sampler = getattr(data, "sampler", None) if sampler is None else sampler
    for part in (sampler, getattr(sampler, "sampler", None)):
        if isinstance(part, DistributedSampler) and part.num_replicas > 1:
            return "its DistributedSampler"
    for part in (data, sampler):
        if type(part).__name__ in ("BatchSamplerShard", "IterableDatasetShard") and part.num_processes > 1:
            return f"accelerate's {type(part).__name__}"
    inner = getattr(data, "data", data)  # of a wrapper that makes a torch dataset of it
    return "split_dataset_by_node of datasets" if getattr(inner, "_distributed", None) is not None else ""


def _sampling_of(sampler: Any, dataset: Any) -> dict[str, Any]:
    """Options in place of the two usual samplers; any other sampler as it is."""
    if type(sampler) is SequentialSampler and len(sampler) == len(dataset):
        return {}
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset):
        return {"shuffle": True}
    return {"sampler": sampler}


def dataloader_kwargs(workers: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a DataLoader; empty where this process can fetch itself.

    Args:
        workers: how many processes fetch.
        given: further arguments by name.

    Returns:
        Arguments of `torch.utils.data.DataLoader`.

    Raises:
        ArgumentError: an argument is unknown, or needs workers and there are none.
    """
    options = {name: value for name, value in given.items() if (not value if name == "in_order" else value)}
    unknown = sorted(given.keys() - set(_DATALOADER_KWARGS))
    if unknown:
        raise ArgumentError(
            f"source has no argument {', '.join(unknown)}. Those for loading are workers, {', '.join(_DATALOADER_KWARGS)}."
        )
    if not torch.accelerator.is_available():
        options.pop("pin_memory", None)
    if workers:
        return options | {"num_workers": workers}
    needless = sorted(options.keys() - {"pin_memory"})
    if needless:
        raise ArgumentError(f"source(workers=0) was given {', '.join(needless)}, which only workers can use. Give workers=1.")
    return options


def _kwargs_of(loader: DataLoader[Any]) -> dict[str, Any]:
    names = _DATALOADER_KWARGS if loader.num_workers else ("pin_memory",)
    return {name: getattr(loader, name, None) for name in names}
