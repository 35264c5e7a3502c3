"""The rank and the device of this process, from the environment of a launcher or from torch.distributed."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Protocol

import torch
from torch import distributed

from fts.distributed import main_process_first as context, process_group
from fts.distributed.process_group import Group, is_initialized
from fts.trainer.arguments.parsing import TRUE_VALUES


class ProcessGroupArguments(Protocol):
    """The arguments that the default process group needs."""

    ddp_backend: str | None

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """How long a collective may take."""

    @property
    def device(self) -> torch.device:
        """Where the model is trained."""


class RankArguments(ProcessGroupArguments, Protocol):
    """Also the rank of this process."""

    @property
    def process_index(self) -> int:
        """The rank of this process."""

    @property
    def local_process_index(self) -> int:
        """The rank on this machine."""


def _launcher_variable(name: str, default: int) -> int:
    """A number that torchrun and accelerate launch give to each process; LOCAL_RANK says that one of them started it."""
    return int(os.environ.get(name, default)) if "LOCAL_RANK" in os.environ else default


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if is_initialized() else _launcher_variable("WORLD_SIZE", 1)


def process_index() -> int:
    """The rank of this process."""
    return distributed.get_rank() if is_initialized() else _launcher_variable("RANK", 0)


def local_process_index() -> int:
    """The rank of this process on its machine."""
    return _launcher_variable("LOCAL_RANK", 0)


def resolve_device(use_cpu: bool) -> torch.device:
    """Where the model is trained.

    >>> resolve_device(use_cpu=True)
    device(type='cpu')
    """
    cpu_only = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in TRUE_VALUES
    accelerator = None if cpu_only else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    if accelerator.type == "mps":
        return accelerator
    launched = "LOCAL_RANK" in os.environ
    return torch.device(accelerator.type, local_process_index() if launched else torch.accelerator.current_device_index())


def num_devices(device_type: str) -> int:
    """How many accelerators this process trains on: all NVIDIA GPUs where it is alone, else one; none on the CPU.

    >>> num_devices("cpu")
    0
    """
    if device_type == "cpu":
        return 0
    alone = device_type == "cuda" and "LOCAL_RANK" not in os.environ and not is_initialized()
    return max(1, torch.cuda.device_count()) if alone else 1


def default_group(args: ProcessGroupArguments) -> Group:
    """The group of all ranks; initialized if it was not yet.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> default_group(TrainingArguments(use_cpu=True)).size
    1
    """
    return process_group.init_process_group(args.ddp_backend, timeout=args.ddp_timeout_delta, device=args.device)


def main_process_first(args: RankArguments, local: bool, desc: str) -> AbstractContextManager[None]:
    """A context in which the main process works before the others, which wait as long as it takes.

    Args:
        args: the training arguments.
        local: the main process of each machine goes first; False: that of all.
        desc: the work, for messages.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> with main_process_first(TrainingArguments(use_cpu=True), True, "tokenizing"):
    ...     pass
    """
    default_group(args)
    is_main_process = (args.local_process_index if local else args.process_index) == 0
    scope = f"machine {os.environ.get('GROUP_RANK', '0')}" if local else ""
    return context.main_process_first(is_main_process, desc, scope=scope)
