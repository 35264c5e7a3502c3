"""Tensors that are spread over processes: torch's DTensors, as `fully_shard` and tensor parallelism make them.

A DTensor is known by its `full_tensor`, so that `torch.distributed.tensor` is imported only where there is one. In everything
that fts makes, a gradient and the moments of a parameter are laid out as the parameter is, and none is an unfinished sum
(`Partial`): so arithmetic that treats every number alike runs on what lies here, and only norms ask the other processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is spread over processes.

    >>> is_dtensor(torch.zeros(2))
    False
    """
    return hasattr(type(tensor), "full_tensor")


def any_dtensor(tensors: Iterable[Any]) -> bool:
    """Whether any of them is; quick for many."""
    return any(hasattr(kind, "full_tensor") for kind in set(map(type, tensors)))


def to_local(tensor: Tensor) -> Tensor:
    """What lies here of a tensor: shares its memory, and passes derivatives on. It may be empty.

    >>> weight = torch.zeros(2)
    >>> to_local(weight) is weight
    True
    """
    if not is_dtensor(tensor):
        return tensor
    sharded = cast(Any, tensor)
    found: Tensor = sharded.to_local() if tensor.requires_grad and torch.is_grad_enabled() else sharded._local_tensor
    return found


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What lies here of each tensor, for kernels on lists, which take no mixture of plain and spread tensors."""
    found = list(tensors)
    return [to_local(tensor) for tensor in found] if any_dtensor(found) else found


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on every process; all must call it.

    >>> weight = torch.zeros(2)
    >>> full_tensor(weight) is weight
    True
    """
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def local_storage_ptr(tensor: Tensor) -> int:
    """The address of the memory that a tensor has here."""
    return (cast(Any, tensor)._local_tensor if is_dtensor(tensor) else tensor).untyped_storage().data_ptr()


def from_local_like(part: Tensor, like: Tensor) -> Tensor:
    """What lies here, as a tensor of the shape and layout of `like`."""
    if not is_dtensor(like):
        return part
    from torch.distributed.tensor import DTensor

    form = cast(Any, like)
    return DTensor.from_local(part, form.device_mesh, form.placements, run_check=False, shape=like.shape, stride=like.stride())


def shard_like(source: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, in the layout of `like`; nothing is sent."""
    if not is_dtensor(like):
        return source
    from torch.distributed.tensor import distribute_tensor

    form = cast(Any, like)
    return distribute_tensor(source, form.device_mesh, form.placements, src_data_rank=None)


def replicate_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A plain tensor that is the same on every process, to be used with `like`; it shares its memory."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = _mesh(like)
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def copy_into(target: AnyTensor, source: Tensor) -> AnyTensor:
    """Copy into a tensor, each of the two spread or not. All processes must call it.

    Args:
        target: is written.
        source: has its shape.

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
    """The same numbers, where they are an unfinished sum over processes as one that is done."""
    if not is_dtensor(tensor):
        return tensor
    sharded = cast(Any, tensor)
    if not any(placement.is_partial() for placement in sharded.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    done: Tensor = sharded.redistribute(placements=[Replicate() if p.is_partial() else p for p in sharded.placements])
    return done


def redistribute_like(tensors: Mapping[str, Tensor], forms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the layouts of those with the same names: gradients as their parameters.

    Args:
        tensors: by name; those that are laid out so already are passed on.
        forms: of the same shapes; those without a name here do not matter.

    Returns:
        A new dictionary.
    """
    if not any_dtensor(tensors.values()) and not any_dtensor(forms.values()):
        return dict(tensors)
    return {name: redistribute(tensor, forms[name]) if name in forms else tensor for name, tensor in tensors.items()}


def redistribute(tensor: Tensor, form: Tensor) -> Tensor:
    """A tensor in the layout of another with its shape; the tensor itself where it is laid out so already."""
    if not is_dtensor(form):
        return full_tensor(tensor)
    if not is_dtensor(tensor):
        return shard_like(tensor, form)
    ours, theirs = cast(Any, tensor)._spec, cast(Any, form)._spec
    if ours is theirs or ours.placements == theirs.placements:
        return tensor
    moved: Tensor = cast(Any, tensor).redistribute(placements=theirs.placements)
    return moved


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """The sum of what each process computed from its part of `like`, on every process.

    Args:
        values: any shape, the same on all processes.
        like: a sharded tensor: its layout says which processes have different parts.

    Returns:
        A plain tensor like `values`. Derivatives go through it.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    form = cast(Any, like)
    for axis, placement in enumerate(form.placements):
        if not placement.is_replicate():
            along = [Partial() if other == axis else Replicate() for other in range(len(form.placements))]
            values = DTensor.from_local(values, form.device_mesh, along, run_check=False).full_tensor()
    return values


def mesh_and_placements(tensor: Tensor) -> Any:
    """What tells tensors that are spread in another way apart; None for those that are not."""
    return (_mesh(tensor), cast(Any, tensor).placements) if is_dtensor(tensor) else None


def global_indices(tensor: Tensor) -> Tensor:
    """The place of each number that lies here in the whole tensor, as if it were flattened.

    Args:
        tensor: any tensor.

    Returns:
        int64, in the shape of what lies here, on its device.

    >>> global_indices(torch.zeros(2, 3))
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    if not is_dtensor(tensor):
        return torch.arange(tensor.numel(), dtype=torch.int64, device=tensor.device).reshape(tensor.shape)
    from torch.distributed.tensor import distribute_tensor

    place, stride = torch.zeros((), dtype=torch.int64, device=tensor.device), 1
    for axis in reversed(range(tensor.ndim)):
        along = torch.arange(tensor.shape[axis], dtype=torch.int64, device=tensor.device) * stride
        parts = distribute_tensor(along, _mesh(tensor), _along(tensor, axis), src_data_rank=None)
        place = place + to_local(parts).reshape(-1, *[1] * (tensor.ndim - 1 - axis))
        stride *= tensor.shape[axis]
    return place


def _along(tensor: Tensor, axis: int) -> list[Any]:
    """How one axis is cut, as the layout of a vector."""
    from torch.distributed.tensor import Replicate, Shard

    def cut(placement: Any) -> Any:
        if getattr(placement, "dim", None) != axis:
            return Replicate()
        # fully_shard over an axis that tensor parallelism has cut keeps the factor of the other cut
        return Shard(0) if placement.is_shard() else type(placement)(0, split_factor=placement.split_factor)

    return [cut(placement) for placement in cast(Any, tensor).placements]


def set_data(parameter: Tensor, tensor: Tensor) -> None:
    """Let a Parameter live in the memory of another tensor; it stays the same object.

    Args:
        parameter: `.data =` has no effect on the part of a DTensor that lies here, so that is exchanged itself.
        tensor: spread if the parameter is.
    """
    if is_dtensor(parameter):
        ours, theirs = cast(Any, parameter), cast(Any, tensor)
        ours._local_tensor, ours._spec = theirs._local_tensor, theirs._spec
    else:
        parameter.data = tensor


def _mesh(tensor: Tensor) -> Any:
    return cast(Any, tensor).device_mesh
