"""In which directions the processes are laid out, and where one of them stands."""

from __future__ import annotations

import functools
from typing import Any

import attrs
from torch import distributed

from fts.distributed.process_group import Group
from fts.errors import ArgumentError

DIMENSIONS = ("replicate", "shard", "context", "sequence", "tensor")
"""From the outermost, whose neighbours lie farthest apart, to the innermost; so accelerate orders them, too."""


@attrs.frozen
class Mesh:
    """How many processes there are in each direction; their product is the number of all.

    Attributes:
        replicate: groups that each hold the whole model among them, and each have rows of their own.
        shard: processes that share parameters, each with rows of its own (FSDP2).
        context: processes that share the tokens of the same rows, with ring attention.
        sequence: processes that share the tokens of the same rows, by exchanging heads (Ulysses).
        tensor: processes that share each matrix, and see the same rows.

    Raises:
        ArgumentError: a size is below 1, or context and sequence are both above 1.

    >>> mesh = Mesh(shard=2, tensor=2)
    >>> mesh.size, mesh.data
    (4, 2)
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    sequence: int = 1
    tensor: int = 1

    def __attrs_post_init__(self) -> None:
        for name in DIMENSIONS:
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ArgumentError(f"Mesh: {name}={size!r} must be a whole number of at least 1.")
        if self.context > 1 and self.sequence > 1:
            raise ArgumentError(
                f"Mesh: context={self.context} and sequence={self.sequence} both cut rows into tokens. Leave one of them at 1."
            )

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.data * self.together

    @property
    def data(self) -> int:
        """How many processes have rows of their own."""
        return self.replicate * self.shard

    @property
    def together(self) -> int:
        """How many processes work on the same rows."""
        return self.context * self.sequence * self.tensor


def data_place(rank: int, mesh: Mesh) -> tuple[int, int]:
    """Which part of the data a process has: (number, of how many).

    Args:
        rank: of the process among all.
        mesh: how they are laid out.

    >>> [data_parallel_rank(rank, Mesh(shard=2, tensor=2)) for rank in range(4)]
    [(0, 2), (0, 2), (1, 2), (1, 2)]
    """
    return rank // mesh.together, mesh.data


def mesh_of(group: Group, mesh: Mesh) -> Any:
    """A DeviceMesh of torch for all processes, with a dimension for each direction; collective.

    Args:
        group: all processes.
        mesh: how they are laid out.

    Returns:
        A DeviceMesh whose dimensions have the names of `DIMENSIONS`. `mesh_of(...)["replicate", "shard"]` is one for `shard`.

    Raises:
        ArgumentError: there are not as many processes.
    """
    if mesh.size != group.size:
        raise ArgumentError(
            f"{mesh} lays out {mesh.size} processes, but there are {group.size}. Make the product of its sizes equal."
        )
    return _devices(group.device.type, mesh, distributed.group.WORLD)


@functools.lru_cache(maxsize=8)
def _devices(kind: str, mesh: Mesh, world: Any) -> Any:
    """Made once for each group of torch's: each makes groups of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, tuple(getattr(mesh, name) for name in DIMENSIONS), mesh_dim_names=DIMENSIONS)


def data_group(group: Group, mesh: Mesh) -> Group:
    """The processes that have other rows than this one, and itself: those that gradients and metrics are summed over; collective.

    Args:
        group: all processes.
        mesh: how they are laid out.

    Returns:
        The group itself where each process has rows of its own.
    """
    if mesh.together == 1:
        return group
    rank, size = data_place(group.rank, mesh)
    if size == 1:
        return attrs.evolve(group, rank=0, size=1)
    return attrs.evolve(group, rank=rank, size=size, handle=_data_handle(group.device.type, mesh, distributed.group.WORLD))


@functools.lru_cache(maxsize=8)
def _data_handle(kind: str, mesh: Mesh, world: Any) -> Any:
    return _devices(kind, mesh, world)["replicate", "shard"]._flatten("data").get_group()
