"""The local shard of the data, the data-parallel group, and the GPUs of this process."""

from __future__ import annotations

import torch

from fts import loops
from fts.distributed import device_mesh
from fts.distributed.process_group import Group
from fts.loops import Source
from fts.trainer.arguments import (
    AcceleratorConfig,
    TrainingArguments,
    data_parallel_rank_and_size,
    default_group,
    parse_accelerator_config,
    resolve_mesh,
)


def data_parallel_group(args: TrainingArguments) -> Group:
    """The data-parallel group of this rank: the ranks that have data of their own. The first call makes it, on all ranks.

    >>> data_parallel_group(TrainingArguments(use_cpu=True)).size
    1
    """
    return device_mesh.data_parallel_group(default_group(args), resolve_mesh(args))


def device_ids(args: TrainingArguments) -> tuple[int, ...]:
    """The indices of the GPUs that this process trains on, its own first; empty for fewer than two.

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
    """The local shard of a source, as `accelerator_config` divides it.

    `even_batches` makes no difference: a rank without a batch runs a padding batch in either case.

    Args:
        source: all the data, the same on each rank.
        args: the arguments; by default rank 0 reads data that can only be iterated (`dispatch_batches`).
    """
    rank, size = data_parallel_rank_and_size(args)
    if size == 1:
        return source
    config = _accelerator_config(args)
    dispatch = source.order is None if config.dispatch_batches is None else config.dispatch_batches
    group = data_parallel_group(args) if dispatch else None
    return loops.shard_source(source, rank, size, split_batches=config.split_batches, dispatch=dispatch, group=group)
