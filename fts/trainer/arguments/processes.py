"""Which process and which device this is."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import distributed

from fts.distributed.process_group import is_started
from fts.trainer.arguments.choices import ParallelMode
from fts.trainer.arguments.parsing import ON
from fts.trainer.reporting.log_level import LEVELS

if TYPE_CHECKING:
    from fts.distributed import Group
    from fts.trainer.arguments.training_arguments import TrainingArguments


def _of_launcher(variable: str, default: int) -> int:
    """A number that torchrun and accelerate launch give to each process; LOCAL_RANK tells that one of them started it."""
    return int(os.environ.get(variable, default)) if "LOCAL_RANK" in os.environ else default


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if is_started() else _of_launcher("WORLD_SIZE", 1)


def process_index() -> int:
    """The number of this process among all."""
    return distributed.get_rank() if is_started() else _of_launcher("RANK", 0)


def local_process_index() -> int:
    """The number of this process among those of its machine."""
    return _of_launcher("LOCAL_RANK", 0)


def device_of(args: TrainingArguments) -> torch.device:
    """Where the model is trained.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> device_of(TrainingArguments(use_cpu=True))
    device(type='cpu')
    """
    wanted = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ON
    found = None if args.use_cpu or wanted else torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    if found.type == "mps":
        return found
    alone = "LOCAL_RANK" not in os.environ
    return torch.device(found.type, torch.accelerator.current_device_index() if alone else local_process_index())


def devices_of(args: TrainingArguments) -> int:
    """How many accelerators this process trains on: all NVIDIA GPUs where it is alone, else one; none on the CPU.

    `_n_gpu` overrules it, as in Hugging Face's.
    """
    kind = args.device.type
    all_of_them = kind == "cuda" and "LOCAL_RANK" not in os.environ and not is_started()
    found = 0 if kind == "cpu" else max(1, torch.cuda.device_count()) if all_of_them else 1
    return int(args.__dict__.get("_n_gpu", found))


def parallel_mode(args: TrainingArguments) -> ParallelMode:
    """How many devices work together, and how."""
    if args.world_size > 1:
        return ParallelMode.DISTRIBUTED
    return ParallelMode.NOT_DISTRIBUTED if args.n_gpu > 1 else ParallelMode.NOT_PARALLEL


def log_level(args: TrainingArguments) -> int:
    """The level of logs for this process, as a number of `logging`."""
    name = args.log_level if args.should_log else args.log_level_replica
    return LEVELS[name] if name in LEVELS else logging.getLogger("fts").getEffectiveLevel()


def started(args: TrainingArguments) -> Group:
    """All processes; joined here if they were not yet.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> started(TrainingArguments(use_cpu=True)).size
    1
    """
    from fts.distributed.process_group import init_process_group

    return init_process_group(args.ddp_backend, timeout=args.ddp_timeout_delta, device=args.device)


def first(args: TrainingArguments, local: bool, what: str) -> AbstractContextManager[None]:
    """Let one process do something before the others, which wait as long as it takes.

    Args:
        args: the training arguments.
        local: one on each machine; False: one of all.
        what: the work, in words.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> with main_process_first(TrainingArguments(use_cpu=True), True, "tokenizing"):
    ...     pass
    """
    from fts.distributed.main_process_first import main_process_first as goes_first

    started(args)
    is_first = (args.local_process_index if local else args.process_index) == 0
    return goes_first(is_first, what, among=f"machine {os.environ.get('GROUP_RANK', '0')}" if local else "")
