"""The processes that train together."""

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

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, accelerate launch and Ray Train tell each process by its environment."""


_CPU = torch.device("cpu")


@attrs.frozen(eq=False)
class Group:
    """Processes that train together, as one of them sees them; made by `init_process_group`.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        local_rank: the number of this process among those of its machine.
        device: where this process computes.
        handle: torch's process group; None for the default one, and for a process that is alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = _CPU
    handle: Any = attrs.field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; it may stand in a graph.

        Args:
            tensor: of the same shape and dtype in each process; it is not changed.

        Returns:
            A new tensor, the same in each process.

        >>> Group().sum(torch.tensor([1.0]))
        tensor([1.])
        """
        if self.size == 1:
            return tensor
        if torch.compiler.is_compiling():
            from torch.distributed._functional_collectives import all_reduce

            handle: Any = distributed.group.WORLD if self.handle is None else self.handle
            return cast(Tensor, all_reduce(tensor, "sum", handle))
        total = tensor.detach().clone()
        distributed.all_reduce(total, group=self.handle)
        return total

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in the order of their ranks.

        Args:
            value: anything that can be pickled, for instance a dictionary of CPU tensors.

        >>> Group().gather("a")
        ['a']
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.handle)
        return values

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each process, in the order of their ranks.

        Args:
            tensor: contiguous, and of the same shape and dtype in each process.

        >>> Group().gather_tensor(torch.ones(1))
        [tensor([1.])]
        """
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(found, tensor, group=self.handle)
        return found

    def broadcast(self, value: Any) -> Any:
        """What the first process has.

        Args:
            value: anything that can be pickled; what the others give is ignored.

        >>> Group().broadcast("a")
        'a'
        """
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, group_src=0, group=self.handle)
        return values[0]

    def scatter(self, values: list[Any] | None) -> Any:
        """What the first process has for this one.

        Args:
            values: of the first process, one for each: anything that can be pickled; None from the others.

        >>> Group().scatter(["a"])
        'a'
        """
        if self.size == 1:
            assert values is not None
            return values[0]
        found: list[Any] = [None]
        distributed.scatter_object_list(found, values, group_src=0, group=self.handle)
        return found[0]

    def copy_first(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors by those of the first process.

        Args:
            tensors: of the same shapes and dtypes in each process.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            source = tensor.contiguous()
            distributed.broadcast(source, group_src=0, group=self.handle)
            if source is not tensor:
                tensor.copy_(source)

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            distributed.barrier(group=self.handle)


ALONE = Group()
"""A process that is none of several."""


def is_started() -> bool:
    """Whether this process is one of a group of torch's."""
    return distributed.is_available() and distributed.is_initialized()


def is_launched(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher such as torchrun has started this process as one of several.

    Args:
        environment: by default that of the process.

    >>> is_launched({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    True
    """
    environment = os.environ if environment is None else environment
    return all(name in environment for name in LAUNCHED)


def restarts(environment: Mapping[str, str] | None = None) -> int:
    """How often torchrun has started the processes again (`--max-restarts`).

    Args:
        environment: by default that of the process.

    >>> restarts({"TORCHELASTIC_RESTART_COUNT": "2"})
    2
    """
    count = (os.environ if environment is None else environment).get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() else 0


def init_process_group(
    backend: str | None = None, *, timeout: float | timedelta | None = None, device: torch.device | str | None = None
) -> Group:
    """Join the processes that a launcher has started; alone where none did.

    Args:
        backend: torch's name, "gloo" or "nccl"; by default the one for the device.
        timeout: how long a process waits for the others before it gives up, in seconds; by default torch's.
        device: where this process computes; by default its own accelerator, or the CPU.

    Returns:
        The group; the one that is there where torch's was started before.

    Raises:
        ArgumentError: torch does not know the backend, or the environment contradicts itself.
        MissingDependencyError: torch was built without it.

    >>> init_process_group(device="cpu")
    Group(rank=0, size=1, local_rank=0, device=device(type='cpu'))
    """
    local_rank = int(os.environ["LOCAL_RANK"]) if is_launched() else 0
    place = _device(local_rank) if device is None else torch.device(device)
    if not is_started():
        if not is_launched():
            return Group(device=place)
        _start(backend, timeout, place)
    return Group(distributed.get_rank(), distributed.get_world_size(), local_rank, place)


def _start(backend: str | None, timeout: float | timedelta | None, device: torch.device) -> None:
    if not distributed.is_available():
        raise MissingDependencyError("Several processes need a torch with torch.distributed, which this one is built without.")
    if backend is None:
        backend = "gloo"
        if device.type != "cpu":  # gloo beside it, for what lies on the CPU: counts, flags, objects
            backend = f"cpu:gloo,{device.type}:{distributed.get_default_backend_for_device(device)}"
    options: dict[str, Any] = {}
    if timeout is not None:
        options["timeout"] = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    if device.type != "cpu":
        options["device_id"] = device
        torch.accelerator.set_device_index(device.index or 0)
    options |= _own_store(options.get("timeout", distributed.default_pg_timeout))
    atexit.register(destroy_process_group)
    try:
        distributed.init_process_group(backend, **options)
    except ValueError as error:
        raise ArgumentError(
            f"The processes cannot be joined with backend={backend!r}: {error} Use 'gloo' on CPUs and 'nccl' on NVIDIA GPUs, "
            "and start the script with torchrun."
        ) from error


def _own_store(timeout: timedelta) -> dict[str, Any]:
    """Where processes that were started again meet: not where those before them left their addresses.

    Torchrun keeps one store for all lives (https://github.com/pytorch/pytorch/issues/135712). On one machine the count of
    restarts tells them apart; machines count for themselves, so for several TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is needed.
    """
    environ = os.environ
    shared = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not restarts() or not shared or environ.get("LOCAL_WORLD_SIZE") != environ["WORLD_SIZE"]:
        return {}
    torch_stores: Any = distributed
    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    store = torch_stores.TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), size, is_master=False, timeout=timeout)
    return {"store": torch_stores.PrefixStore(f"restart-{restarts()}", store), "rank": rank, "world_size": size}


def destroy_process_group() -> None:
    """Leave the group, if there is one; a process that `init_process_group` has let in does so at its end."""
    if is_started():
        distributed.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or found.type == "mps" else torch.device(found.type, local_rank)
