"""Which part of the data this process has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fts import loops
from fts.distributed import device_mesh
from fts.loops import Source
from fts.trainer.arguments import AcceleratorConfig, TrainingArguments
from fts.trainer.arguments.accelerator_config import parse_accelerator_config
from fts.trainer.arguments.data_parallel import data_parallel_rank
from fts.trainer.arguments.processes import default_group
from fts.trainer.arguments.strategy import resolve_mesh

if TYPE_CHECKING:
    from fts.distributed.process_group import Group


def data_parallel_group(args: TrainingArguments) -> Group:
    """The processes that have data of their own, this one among them; joined here if they were not yet.

    >>> data_parallel_group(TrainingArguments(use_cpu=True)).size
    1
    """
    return device_mesh.data_parallel_group(default_group(args), resolve_mesh(args))


def device_ids(args: TrainingArguments) -> tuple[int, ...]:
    """The numbers of the GPUs that this process trains on, its own first; empty where it has not several.

    >>> device_ids(TrainingArguments(use_cpu=True))
    ()
    """
    own = args.device
    if own.type != "cuda" or args.n_gpu < 2:
        return ()
    first = own.index or 0
    return (first, *[number for number in range(torch.cuda.device_count()) if number != first][: args.n_gpu - 1])


def _accelerator_config(args: TrainingArguments) -> AcceleratorConfig:
    return parse_accelerator_config("accelerator_config", args.accelerator_config)


def local_shard(source: Source, args: TrainingArguments) -> Source:
    """This process's part of a source, as `accelerator_config` shares it.

    `even_batches` makes no difference: a process without a batch runs one that weighs nothing in either case.

    Args:
        source: the whole data, the same in each process.
        args: the arguments; without `dispatch_batches` the first process reads data that can only be iterated.
    """
    rank, size = data_parallel_rank(args)
    if size == 1:
        return source
    config = _accelerator_config(args)
    dispatch = source.order is None if config.dispatch_batches is None else config.dispatch_batches
    group = data_parallel_group(args) if dispatch else None
    return loops.shard_source(source, rank, size, split_batches=config.split_batches, dispatch=dispatch, group=group)
