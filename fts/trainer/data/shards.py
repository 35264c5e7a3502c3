"""Which part of the data this process has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fts import loops
from fts.distributed import device_mesh
from fts.loops import Source
from fts.trainer.arguments import AcceleratorConfig, TrainingArguments
from fts.trainer.arguments.accelerator_config import accelerator_config
from fts.trainer.arguments.processes import started
from fts.trainer.arguments.strategy import mesh_for

if TYPE_CHECKING:
    from fts.distributed.process_group import Group


def data_parallel_rank(args: TrainingArguments) -> tuple[int, int]:
    """The number of this process among those that have data of their own, and how many these are.

    >>> data_parallel_rank(TrainingArguments(use_cpu=True))
    (0, 1)
    """
    return device_mesh.data_place(args.process_index, mesh_for(args))


def data_group(args: TrainingArguments) -> Group:
    """The processes that have data of their own, this one among them; joined here if they were not yet.

    >>> data_group(TrainingArguments(use_cpu=True)).size
    1
    """
    return device_mesh.data_group(started(args), mesh_for(args))


def devices(args: TrainingArguments) -> tuple[int, ...]:
    """The numbers of the GPUs that this process trains on, its own first; empty where it has not several.

    >>> devices(TrainingArguments(use_cpu=True))
    ()
    """
    own = args.device
    if own.type != "cuda" or args.n_gpu < 2:
        return ()
    first = own.index or 0
    return (first, *[number for number in range(torch.cuda.device_count()) if number != first][: args.n_gpu - 1])


def _config(args: TrainingArguments) -> AcceleratorConfig:
    return accelerator_config("accelerator_config", args.accelerator_config)


def sharers(args: TrainingArguments) -> int:
    """How many processes have a batch of `per_device_train_batch_size` rows each; 1 where `split_batches` cuts one for all.

    >>> sharers(TrainingArguments(use_cpu=True))
    1
    """
    return 1 if _config(args).split_batches else data_parallel_rank(args)[1]


def shared(source: Source, args: TrainingArguments) -> Source:
    """This process's part of a source, as `accelerator_config` shares it.

    `even_batches` makes no difference: a process without a batch runs one that weighs nothing in either case.

    Args:
        source: the whole data, the same in each process.
        args: the arguments; without `dispatch_batches` the first process reads data that can only be iterated.
    """
    rank, size = data_parallel_rank(args)
    if size == 1:
        return source
    config = _config(args)
    dispatch = source.order is None if config.dispatch_batches is None else config.dispatch_batches
    group = data_group(args) if dispatch else None
    return loops.shard_source(source, rank, size, split_batches=config.split_batches, dispatch=dispatch, group=group)
