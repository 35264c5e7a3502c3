"""The process group: its initialization, and its collectives."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import attrs
import torch
from torch import Tensor, distributed

from fts.errors import ArgumentError, MissingDependencyError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torchrun, accelerate launch and Ray Train set for each process."""


_CPU = torch.device("cpu")


@attrs.frozen(eq=False)
class Group:
    """A process group, and the rank of this process in it; created by `init_process_group`.

    Attributes:
        rank: of this process, from 0.
        size: the world size.
        local_rank: the rank of this process on its machine.
        device: where this process computes.
        process_group: torch's process group; None for the default one, and for a single process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = _CPU
    process_group: Any = attrs.field(default=None, repr=False)

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks; it may be traced into a graph.

        Args:
            tensor: of the same shape and dtype on each rank; it is not changed.

        Returns:
            A new tensor, the same on each rank.

        >>> Group().all_reduce(torch.tensor([1.0]))
        tensor([1.])
        """
        if self.size == 1:
            return tensor
        if torch.compiler.is_compiling():
            from torch.distributed._functional_collectives import all_reduce

            process_group: Any = distributed.group.WORLD if self.process_group is None else self.process_group
            return cast(Tensor, all_reduce(tensor, "sum", process_group))
        total = tensor.detach().clone()
        distributed.all_reduce(total, group=self.process_group)
        return total

    def all_gather_object(self, value: Any) -> list[Any]:
        """The objects of all ranks, in the order of the ranks.

        Args:
            value: anything that can be pickled, for instance a dictionary of CPU tensors.

        >>> Group().all_gather_object("a")
        ['a']
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.process_group)
        return values

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in the order of the ranks.

        Args:
            tensor: contiguous, and of the same shape and dtype on each rank.

        >>> Group().all_gather(torch.ones(1))
        [tensor([1.])]
        """
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(found, tensor, group=self.process_group)
        return found

    def broadcast_object(self, value: Any) -> Any:
        """The object of the main process.

        Args:
            value: anything that can be pickled; that of other ranks is ignored.

        >>> Group().broadcast_object("a")
        'a'
        """
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, group_src=0, group=self.process_group)
        return values[0]

    def scatter_object(self, values: list[Any] | None) -> Any:
        """The object that the main process has for this rank.

        Args:
            values: on the main process, one for each rank: anything that can be pickled; None on other ranks.

        >>> Group().scatter_object(["a"])
        'a'
        """
        if self.size == 1:
            assert values is not None
            return values[0]
        found: list[Any] = [None]
        distributed.scatter_object_list(found, values, group_src=0, group=self.process_group)
        return found[0]

    def broadcast_(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors with those of the main process.

        Args:
            tensors: of the same shapes and dtypes on each rank.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            source = tensor.contiguous()
            distributed.broadcast(source, group_src=0, group=self.process_group)
            if source is not tensor:
                tensor.copy_(source)

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        if self.size > 1:
            distributed.barrier(group=self.process_group)


SINGLE_PROCESS = Group()
"""The group of a single process."""


def is_initialized() -> bool:
    """Whether torch's default process group is initialized."""
    return distributed.is_available() and distributed.is_initialized()


def is_launched(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher such as torchrun has started this process.

    Args:
        environment: by default that of the process.

    >>> is_launched({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    True
    """
    environment = os.environ if environment is None else environment
    return all(name in environment for name in LAUNCHER_VARIABLES)


def restart_count(environment: Mapping[str, str] | None = None) -> int:
    """How often torchrun has started the processes again (`--max-restarts`).

    Args:
        environment: by default that of the process.

    >>> restart_count({"TORCHELASTIC_RESTART_COUNT": "2"})
    2
    """
    count = (os.environ if environment is None else environment).get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() else 0


def init_process_group(
    backend: str | None = None, *, timeout: float | timedelta | None = None, device: torch.device | str | None = None
) -> Group:
    """Initialize the process group of the processes that a launcher has started; of one process where none did.

    Args:
        backend: of torch, "gloo" or "nccl"; by default the one for the device.
        timeout: how long a collective waits for other ranks, in seconds; by default torch's.
        device: where this process computes; by default its own accelerator, or the CPU.

    Returns:
        The group; that of torch's default process group if it is initialized already.

    Raises:
        ArgumentError: torch does not know the backend, or the environment variables are inconsistent.
        MissingDependencyError: torch was built without torch.distributed.

    >>> init_process_group(device="cpu")
    Group(rank=0, size=1, local_rank=0, device=device(type='cpu'))
    """
    local_rank = int(os.environ["LOCAL_RANK"]) if is_launched() else 0
    own_device = _default_device(local_rank) if device is None else torch.device(device)
    if not is_initialized():
        if not is_launched():
            return Group(device=own_device)
        _init_torch_process_group(backend, timeout, own_device)
    return Group(distributed.get_rank(), distributed.get_world_size(), local_rank, own_device)


def _init_torch_process_group(backend: str | None, timeout: float | timedelta | None, device: torch.device) -> None:
    if not distributed.is_available():
        raise MissingDependencyError("Several processes need torch.distributed, which this build of torch does not have.")
    if backend is None:
        backend = "gloo"
        if device.type != "cpu":  # gloo for CPU tensors: counts, flags, objects
            backend = f"cpu:gloo,{device.type}:{distributed.get_default_backend_for_device(device)}"
    options: dict[str, Any] = {}
    if timeout is not None:
        options["timeout"] = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    if device.type != "cpu":
        options["device_id"] = device
        torch.accelerator.set_device_index(device.index or 0)
    options |= _restart_store(options.get("timeout", distributed.default_pg_timeout))
    atexit.register(destroy_process_group)
    try:
        distributed.init_process_group(backend, **options)
    except ValueError as error:
        raise ArgumentError(
            f"The process group cannot be initialized with backend={backend!r}: {error} Use 'gloo' on CPUs and 'nccl' on NVIDIA "
            "GPUs, and start the script with torchrun."
        ) from error


def _restart_store(timeout: timedelta) -> dict[str, Any]:
    """A rendezvous store of its own for each restart, without the addresses of the processes before it.

    Torchrun keeps one store for all restarts (https://github.com/pytorch/pytorch/issues/135712). On one machine the restart count
    separates them; each machine counts for itself, so several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    environ = os.environ
    shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not restart_count() or not shared or environ.get("LOCAL_WORLD_SIZE") != environ["WORLD_SIZE"]:
        return {}
    torch_stores: Any = distributed
    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    store = torch_stores.TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), size, is_master=False, timeout=timeout)
    return {"store": torch_stores.PrefixStore(f"restart-{restart_count()}", store), "rank": rank, "world_size": size}


def destroy_process_group() -> None:
    """Destroy the process group, if there is one; `init_process_group` registers it to run at exit."""
    if is_initialized():
        distributed.destroy_process_group()


def _default_device(local_rank: int) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or found.type == "mps" else torch.device(found.type, local_rank)
