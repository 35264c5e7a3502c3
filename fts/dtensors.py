"""Helpers for DTensors, the sharded tensors of `fully_shard` and tensor parallelism.

A DTensor is recognized by its `full_tensor` method, so `torch.distributed.tensor` is imported only if there is one. In all that
fts makes, gradients and moments have the placements of their parameter, and none is partial: so elementwise arithmetic runs on
local shards, and only norms need collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor.

    >>> is_dtensor(torch.zeros(2))
    False
    """
    return hasattr(type(tensor), "full_tensor")


def any_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether any of the tensors is a DTensor; fast for many."""
    return any(hasattr(kind, "full_tensor") for kind in set(map(type, tensors)))


def to_local(tensor: Tensor) -> Tensor:
    """The local shard of a tensor: shares its memory, and is differentiable. It may be empty.

    >>> weight = torch.zeros(2)
    >>> to_local(weight) is weight
    True
    """
    if not is_dtensor(tensor):
        return tensor
    dtensor = cast(Any, tensor)
    local: Tensor = dtensor.to_local() if tensor.requires_grad and torch.is_grad_enabled() else dtensor._local_tensor
    return local


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The local shard of each tensor, for foreach kernels, which take no mixture of plain tensors and DTensors."""
    found = list(tensors)
    return [to_local(tensor) for tensor in found] if any_dtensor(found) else found


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank; all ranks must call it.

    >>> weight = torch.zeros(2)
    >>> full_tensor(weight) is weight
    True
    """
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def local_storage_ptr(tensor: Tensor) -> int:
    """The address of the storage of a tensor, or of its local shard."""
    return (cast(Any, tensor)._local_tensor if is_dtensor(tensor) else tensor).untyped_storage().data_ptr()


def from_local_like(local: Tensor, like: Tensor) -> Tensor:
    """A local shard as a DTensor with the shape, mesh and placements of `like`."""
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    dtensor = cast(Any, like)
    return DTensor.from_local(
        local, dtensor.device_mesh, dtensor.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def shard_like(source: Tensor, like: Tensor) -> Tensor:
    """A tensor that is full on every rank, with the placements of `like`; without communication."""
    if not is_dtensor(like):
        return source
    from torch.distributed.tensor import distribute_tensor

    dtensor = cast(Any, like)
    return distribute_tensor(source, dtensor.device_mesh, dtensor.placements, src_data_rank=None)


def replicate_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that is equal on every rank, as a replicated DTensor on the mesh of `like`; shares its memory."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = _mesh(like)
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def copy_into(target: AnyTensor, source: Tensor) -> AnyTensor:
    """Copy into a tensor; each of the two may be a DTensor. All ranks must call it.

    Args:
        target: overwritten.
        source: with the same shape.

    Returns:
        `target`.

    >>> copy_into(torch.zeros(2), torch.ones(2))
    tensor([1., 1.])
    """
    if is_dtensor(source) and not (is_dtensor(target) and _mesh(source) == _mesh(target)):
        source = full_tensor(source)
    target.copy_(source if is_dtensor(source) else shard_like(source, target))
    return target


def reduce_partial(tensor: Tensor) -> Tensor:
    """The tensor, with partial placements reduced to replicated ones."""
    if not is_dtensor(tensor):
        return tensor
    dtensor = cast(Any, tensor)
    if not any(placement.is_partial() for placement in dtensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    reduced: Tensor = dtensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in dtensor.placements])
    return reduced


def redistribute_like(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the placements of those with the same names, such as gradients with those of their parameters.

    Args:
        tensors: by name; those that have these placements already are returned as they are.
        targets: of the same shapes; names that are not in `tensors` are ignored.

    Returns:
        A new dictionary.
    """
    if not any_dtensor(tensors.values()) and not any_dtensor(targets.values()):
        return dict(tensors)
    return {name: redistribute(tensor, targets[name]) if name in targets else tensor for name, tensor in tensors.items()}


def redistribute(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with the placements of another of the same shape; the tensor itself if it has them already."""
    if not is_dtensor(like):
        return full_tensor(tensor)
    if not is_dtensor(tensor):
        return shard_like(tensor, like)
    own, target = cast(Any, tensor)._spec, cast(Any, like)._spec
    if own is target or own.placements == target.placements:
        return tensor
    result: Tensor = cast(Any, tensor).redistribute(placements=target.placements)
    return result


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """Sum values that each rank has computed from its local shard of `like`; the result is on every rank.

    Args:
        values: of any shape, the same on all ranks.
        like: a DTensor; its placements say which ranks have different shards.

    Returns:
        A plain tensor like `values`; differentiable.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    dtensor = cast(Any, like)
    for mesh_dim, placement in enumerate(dtensor.placements):
        if not placement.is_replicate():
            placements = [Partial() if other == mesh_dim else Replicate() for other in range(len(dtensor.placements))]
            values = DTensor.from_local(values, dtensor.device_mesh, placements, run_check=False).full_tensor()
    return values


def mesh_and_placements(tensor: Tensor) -> Any:
    """The mesh and placements of a DTensor, to be compared; None for a plain tensor."""
    return (_mesh(tensor), cast(Any, tensor).placements) if is_dtensor(tensor) else None


def global_indices(tensor: Tensor) -> Tensor:
    """The index in the flattened full tensor of each element of the local shard.

    Args:
        tensor: any tensor.

    Returns:
        int64, in the shape of the local shard, on its device.

    >>> global_indices(torch.zeros(2, 3))
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    if not is_dtensor(tensor):
        return torch.arange(tensor.numel(), dtype=torch.int64, device=tensor.device).reshape(tensor.shape)
    from torch.distributed.tensor import distribute_tensor

    index, stride = torch.zeros((), dtype=torch.int64, device=tensor.device), 1
    for axis in reversed(range(tensor.ndim)):
        offsets = torch.arange(tensor.shape[axis], dtype=torch.int64, device=tensor.device) * stride
        shards = distribute_tensor(offsets, _mesh(tensor), _axis_placements(tensor, axis), src_data_rank=None)
        index = index + to_local(shards).reshape(-1, *[1] * (tensor.ndim - 1 - axis))
        stride *= tensor.shape[axis]
    return index


def _axis_placements(tensor: Tensor, axis: int) -> list[Any]:
    """The placements of one axis, for a vector of its length."""
    from torch.distributed.tensor import Replicate, Shard

    def of_axis(placement: Any) -> Any:
        if getattr(placement, "dim", None) != axis:
            return Replicate()
        # fully_shard on an axis that tensor parallelism has sharded has a strided placement, whose split factor must be kept
        return Shard(0) if placement.is_shard() else type(placement)(0, split_factor=placement.split_factor)

    return [of_axis(placement) for placement in cast(Any, tensor).placements]


def set_data(parameter: Tensor, tensor: Tensor) -> None:
    """Point a Parameter at the memory of another tensor, as `.data =`; it stays the same object.

    Args:
        parameter: for a DTensor, on which `.data =` has no effect, the local tensor is replaced.
        tensor: a DTensor if the parameter is one.
    """
    if is_dtensor(parameter):
        own, other = cast(Any, parameter), cast(Any, tensor)
        own._local_tensor, own._spec = other._local_tensor, other._spec
    else:
        parameter.data = tensor


def _mesh(tensor: Tensor) -> Any:
    return cast(Any, tensor).device_mesh
