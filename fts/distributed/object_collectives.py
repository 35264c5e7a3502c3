"""All-gather of objects: tensors of any number and shape, and anything that can be pickled."""

from __future__ import annotations

import io
import pickle
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from fts.distributed.process_group import Group

ALIGNMENT = 16
"""Bytes to which each tensor is aligned, so that the buffer can be viewed in any dtype."""

TensorSpec: TypeAlias = tuple[torch.Size, torch.dtype, str]
"""Shape, dtype and device type of a tensor."""


def single_process_gather(value: Any) -> list[Any]:
    """`AllGatherObject` for a single process."""
    return [] if value is None else [value]


@attrs.frozen
class AllGatherObject:
    """Gathers an object from all ranks, on all ranks, in the order of the ranks; collective.

    Args:
        group: the processes.
        use_gather_object: pickle tensors with the rest of the object, through the CPU, instead of from device to device.

    >>> AllGatherObject(Group())({"logits": torch.ones(1), "text": "a"})
    [{'logits': tensor([1.]), 'text': 'a'}]
    """

    group: Group
    use_gather_object: bool = False

    def __call__(self, value: Any) -> list[Any]:
        """The objects of all ranks.

        Args:
            value: anything that can be pickled; None is left out of the result. Tensors may differ in number and shape.

        Returns:
            One object for each rank whose object is not None.
        """
        if self.group.size == 1:
            return single_process_gather(value)
        tensors: list[Tensor] = []
        pickled = _dumps_without_tensors(value, tensors)
        if self.use_gather_object:
            gathered = self.group.all_gather_object((pickled, [tensor.cpu() for tensor in tensors]))
        else:
            own_specs: list[TensorSpec] = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
            pickles, specs = zip(*self.group.all_gather_object((pickled, own_specs)), strict=True)
            gathered = list(zip(pickles, _all_gather_tensors(self.group, tensors, specs), strict=True))
        values = [_loads_with_tensors(data, own_tensors) for data, own_tensors in gathered]
        return [value for value in values if value is not None]


class _TensorPickler(pickle.Pickler):
    """Pickles an object without its tensors, which are collected in a list."""

    def __init__(self, file: Any, tensors: list[Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor) or obj.layout != torch.strided:
            return None
        self.tensors.append(obj.detach())
        return len(self.tensors) - 1


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles what `_TensorPickler` of another rank of this run wrote, with its tensors from a list."""

    def __init__(self, file: Any, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


def _dumps_without_tensors(value: Any, tensors: list[Tensor]) -> bytes:
    """Pickle an object without its tensors, which are appended to a list."""
    file = io.BytesIO()
    _TensorPickler(file, tensors).dump(value)
    return file.getvalue()


def _loads_with_tensors(pickled: bytes, tensors: list[Tensor]) -> Any:
    return _TensorUnpickler(io.BytesIO(pickled), tensors).load()


def _all_gather_tensors(group: Group, own: list[Tensor], specs: tuple[list[TensorSpec], ...]) -> list[list[Tensor]]:
    """The tensors of each rank, whose specs are known: one all-gather of bytes for each device type."""
    found: list[list[Tensor]] = [[torch.empty(0)] * len(rank_specs) for rank_specs in specs]
    for device_type in sorted({spec[2] for rank_specs in specs for spec in rank_specs}):
        device = group.device if group.device.type == device_type else torch.device(device_type)
        offsets = [_offsets(rank_specs, device_type) for rank_specs in specs]
        buffer = torch.empty(max(starts[-1] for starts in offsets), dtype=torch.uint8, device=device)
        local_tensors = (tensor for tensor in own if tensor.device.type == device_type)
        for tensor, start in zip(local_tensors, offsets[group.rank], strict=False):
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            buffer[start : start + flat.numel()] = flat
        buffers = group.all_gather(buffer) if buffer.numel() else [buffer] * group.size
        for rank_specs, starts, tensors, received in zip(specs, offsets, found, buffers, strict=True):
            indices = [index for index, spec in enumerate(rank_specs) if spec[2] == device_type]
            for index, start in zip(indices, starts, strict=False):
                shape, dtype, _ = rank_specs[index]
                tensors[index] = received[start : start + _nbytes(shape, dtype)].view(dtype).reshape(shape)
    return found


def _offsets(specs: list[TensorSpec], device_type: str) -> list[int]:
    """The offset in bytes of each tensor of a device type, and the end of the last one."""
    offsets = [0]
    for shape, dtype, own_type in specs:
        if own_type == device_type:
            offsets.append(offsets[-1] + -(-_nbytes(shape, dtype) // ALIGNMENT) * ALIGNMENT)
    return offsets


def _nbytes(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize
