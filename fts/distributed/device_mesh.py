"""The device mesh: how many processes share parameters, tokens and matrices, and the data-parallel group of each."""

from __future__ import annotations

import functools
from typing import Any

import attrs
from torch import distributed

from fts.distributed.process_group import Group
from fts.errors import ArgumentError

MESH_DIM_NAMES = ("replicate", "shard", "context", "sequence", "tensor")
"""From the outermost, with the farthest neighbours, to the innermost; accelerate has the same order."""


@attrs.frozen
class Mesh:
    """The sizes of a device mesh; their product is the world size.

    Attributes:
        replicate: replicas of the model, each with examples of its own.
        shard: ranks over which parameters are sharded, each with examples of its own (FSDP2).
        context: ranks that share the tokens of the same examples, by ring attention.
        sequence: ranks that share the tokens of the same examples, by all-to-all over heads (Ulysses).
        tensor: ranks over which each matrix is sharded, with the same examples.

    Raises:
        ArgumentError: a size is below 1, or context and sequence are both above 1.

    >>> mesh = Mesh(shard=2, tensor=2)
    >>> mesh.size, mesh.data_parallel_size
    (4, 2)
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    sequence: int = 1
    tensor: int = 1

    def __attrs_post_init__(self) -> None:
        for name in MESH_DIM_NAMES:
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ArgumentError(f"Mesh: {name}={size!r} must be a whole number of at least 1.")
        if self.context > 1 and self.sequence > 1:
            raise ArgumentError(
                f"Mesh: context={self.context} and sequence={self.sequence} both shard the tokens of an example. Leave one of "
                "them at 1."
            )

    @property
    def size(self) -> int:
        """The world size."""
        return self.data_parallel_size * self.non_data_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """How many ranks have examples of their own."""
        return self.replicate * self.shard

    @property
    def non_data_parallel_size(self) -> int:
        """How many ranks work on the same examples."""
        return self.context * self.sequence * self.tensor


def data_parallel_rank_and_size(rank: int, mesh: Mesh) -> tuple[int, int]:
    """The data-parallel rank of a process, and the data-parallel size.

    Args:
        rank: the global rank.
        mesh: of all processes.

    >>> [data_parallel_rank_and_size(rank, Mesh(shard=2, tensor=2)) for rank in range(4)]
    [(0, 2), (0, 2), (1, 2), (1, 2)]
    """
    return rank // mesh.non_data_parallel_size, mesh.data_parallel_size


def init_device_mesh(group: Group, mesh: Mesh) -> Any:
    """Torch's DeviceMesh for all processes; collective.

    Args:
        group: all processes.
        mesh: its sizes.

    Returns:
        A DeviceMesh with the dimensions `MESH_DIM_NAMES`. `init_device_mesh(...)["replicate", "shard"]` is one for `fully_shard`.

    Raises:
        ArgumentError: its size is not the world size.
    """
    if mesh.size != group.size:
        raise ArgumentError(
            f"{mesh} is for {mesh.size} processes, but there are {group.size}. Make the product of its sizes equal."
        )
    return _cached_device_mesh(group.device.type, mesh, distributed.group.WORLD)


@functools.lru_cache(maxsize=8)
def _cached_device_mesh(device_type: str, mesh: Mesh, world: Any) -> Any:
    """Created once for each process group of torch: each DeviceMesh creates process groups of its own."""
    from torch.distributed import device_mesh

    sizes = tuple(getattr(mesh, name) for name in MESH_DIM_NAMES)
    return device_mesh.init_device_mesh(device_type, sizes, mesh_dim_names=MESH_DIM_NAMES)


def data_parallel_group(group: Group, mesh: Mesh) -> Group:
    """The data-parallel group of this process, over which gradients and metrics are reduced; collective.

    Args:
        group: all processes.
        mesh: its sizes.

    Returns:
        The group itself where each rank has examples of its own.
    """
    if mesh.non_data_parallel_size == 1:
        return group
    rank, size = data_parallel_rank_and_size(group.rank, mesh)
    if size == 1:
        return attrs.evolve(group, rank=0, size=1)
    return attrs.evolve(
        group, rank=rank, size=size, process_group=_data_process_group(group.device.type, mesh, distributed.group.WORLD)
    )


@functools.lru_cache(maxsize=8)
def _data_process_group(device_type: str, mesh: Mesh, world: Any) -> Any:
    return _cached_device_mesh(device_type, mesh, world)["replicate", "shard"]._flatten("data").get_group()
