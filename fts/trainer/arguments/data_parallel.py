"""How the data is divided between processes: the data-parallel rank, and how many batches make a step."""

from __future__ import annotations

from typing import Any, Protocol

from fts.distributed import device_mesh
from fts.trainer.arguments.accelerator_config import parse_accelerator_config
from fts.trainer.arguments.strategy import StrategyArguments, resolve_mesh


class DataParallelArguments(StrategyArguments, Protocol):
    """The arguments that say how data is divided."""

    accelerator_config: dict[str, Any] | str | None

    @property
    def process_index(self) -> int:
        """The rank of this process."""


def data_parallel_rank_and_size(args: DataParallelArguments) -> tuple[int, int]:
    """The data-parallel rank of this process, and the data-parallel size.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> data_parallel_rank_and_size(TrainingArguments(use_cpu=True))
    (0, 1)
    """
    return device_mesh.data_parallel_rank_and_size(args.process_index, resolve_mesh(args))


def num_parallel_batches(args: DataParallelArguments) -> int:
    """How many batches of `per_device_train_batch_size` examples the processes have at a time.

    It is the number of data-parallel ranks, or 1 where `split_batches` divides one batch between them.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> num_parallel_batches(TrainingArguments(use_cpu=True))
    1
    """
    config = parse_accelerator_config("accelerator_config", args.accelerator_config)
    return 1 if config.split_batches else data_parallel_rank_and_size(args)[1]
