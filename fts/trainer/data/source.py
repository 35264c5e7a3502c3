"""The numbered epochs of numbered batches that a run reads, made from a DataLoader."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from fts import loops
from fts.errors import DataError
from fts.loops import Source
from fts.trainer.arguments import TrainingArguments, data_parallel_rank_and_size
from fts.trainer.data.dataloader import check_not_empty
from fts.trainer.data.shards import local_shard


def make_source(
    loader: Any,
    *,
    seed: int,
    device: torch.device,
    what: str,
    micro_batches: int = 1,
    shard: Callable[[Source], Source] = lambda source: source,
) -> Source:
    """The numbered epochs of numbered batches of a loader, on a device.

    Args:
        loader: that of `train_dataloader`, or a user's: any DataLoader, or an iterable of batches that can be iterated again.
        seed: the seed of the order and of everything random in the data.
        device: where the batches go.
        what: "training" or "evaluation", for messages.
        micro_batches: how many batches make one step.
        shard: returns the local shard of the source.

    Returns:
        The source. Data that can be indexed is not read where it is skipped.

    Raises:
        DataError: there is no batch, or the loader cannot be iterated.
    """
    if hasattr(loader, "dataset"):
        check_not_empty(loader.dataset, what)
    source = loops.source(unshard_dataloader(loader), seed=seed, micro_batches=micro_batches)
    if source.batches_per_epoch == 0:
        if source.num_examples:
            raise DataError(
                f"The {what} set has {source.num_examples} examples, fewer than a batch of {source.batch_size}, and "
                "dataloader_drop_last=True leaves them out. Use a smaller batch, or keep the last one."
            )
        raise DataError(f"The {what} loader ({type(loader).__name__}) has no batch. Give it at least one.")
    return loops.on_device(shard(source), device)


def eval_batches(loader: Any, args: TrainingArguments, seed: int) -> Any:
    """The batches of an evaluation that this process predicts: those of the loader, or its local shard of them.

    Args:
        loader: all the data, the same on each rank.
        args: the arguments.
        seed: of what is random in the data, where several processes divide it.
    """
    if data_parallel_rank_and_size(args)[1] == 1:
        return loader
    return make_source(loader, seed=seed, device=args.device, what="evaluation", shard=partial(local_shard, args=args)).epoch(0)


def unshard_dataloader(loader: Any) -> Any:
    """A loader of all the data, also where accelerate has reduced it to the shard of this process."""
    if type(loader).__module__ == "accelerate.data_loader" and hasattr(loader, "base_dataloader"):
        return _base_dataloader(loader.base_dataloader)
    return loader


def _base_dataloader(loader: DataLoader[Any]) -> DataLoader[Any]:
    data, sampler = loader.dataset, loader.batch_sampler
    options = {name: getattr(loader, name) for name in _LOADER_OPTIONS}
    if type(data).__name__ == "IterableDatasetShard":
        shard: Any = data
        return DataLoader(shard.dataset, batch_size=shard.batch_size, drop_last=shard.drop_last, **options)
    if type(sampler).__name__ == "BatchSamplerShard":
        return DataLoader(data, batch_sampler=sampler.batch_sampler, **options)  # type: ignore[union-attr]  # it has one
    return loader


_LOADER_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
