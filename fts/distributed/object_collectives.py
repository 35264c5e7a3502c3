"""What each of several processes has, brought to all of them: tensors of any number and shape, and what can be pickled."""

from __future__ import annotations

import io
import pickle
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from fts.distributed.process_group import Group

ALIGNED = 16
"""Each tensor begins at a multiple of so many bytes, so that it can be seen as numbers of any type."""

Form: TypeAlias = tuple[torch.Size, torch.dtype, str]
"""Shape, type and kind of device of a tensor."""


def alone(value: Any) -> list[Any]:
    """The exchange of a process that has no others."""
    return [] if value is None else [value]


@attrs.frozen
class AllGatherObject:
    """Gives every process what each of them has, in the order of their ranks.

    Args:
        group: the processes; all of them call it as often.
        by_objects: send tensors with everything else, by way of the CPU and pickled, instead of from device to device.

    >>> AllGatherObject(Group())({"logits": torch.ones(1), "text": "a"})
    [{'logits': tensor([1.]), 'text': 'a'}]
    """

    group: Group
    by_objects: bool = False

    def __call__(self, value: Any) -> list[Any]:
        """What all processes have.

        Args:
            value: anything that can be pickled; None is left out of what comes back. Tensors may differ in number and shape.

        Returns:
            One for each process that has one.
        """
        if self.group.size == 1:
            return alone(value)
        tensors: list[Tensor] = []
        frame = _frame_of(value, tensors)
        if self.by_objects:
            every = self.group.gather((frame, [tensor.cpu() for tensor in tensors]))
        else:
            forms: list[Form] = [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors]
            frames, every_form = zip(*self.group.gather((frame, forms)), strict=True)
            every = list(zip(frames, _gathered(self.group, tensors, every_form), strict=True))
        values = [_filled(frame, found) for frame, found in every]
        return [found for found in values if found is not None]


class _Taking(pickle.Pickler):
    """Leaves the tensors out of what is pickled."""

    def __init__(self, file: Any, tensors: list[Tensor]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor) or obj.layout != torch.strided:
            return None
        self.tensors.append(obj.detach())
        return len(self.tensors) - 1


class _Giving(pickle.Unpickler):
    """Puts tensors in their places. What is read was written by another process of this run."""

    def __init__(self, file: Any, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


def _frame_of(value: Any, tensors: list[Tensor]) -> bytes:
    """A value without its tensors, which are appended to a list."""
    file = io.BytesIO()
    _Taking(file, tensors).dump(value)
    return file.getvalue()


def _filled(frame: bytes, tensors: list[Tensor]) -> Any:
    return _Giving(io.BytesIO(frame), tensors).load()


def _gathered(group: Group, own: list[Tensor], every: tuple[list[Form], ...]) -> list[list[Tensor]]:
    """The tensors of each process, whose forms are known: for each kind of device one collective operation over all bytes."""
    found: list[list[Tensor]] = [[torch.empty(0)] * len(forms) for forms in every]
    for kind in sorted({form[2] for forms in every for form in forms}):
        device = group.device if group.device.type == kind else torch.device(kind)
        ends = [_ends(forms, kind) for forms in every]
        sent = torch.empty(max(end[-1] for end in ends), dtype=torch.uint8, device=device)
        for tensor, end in zip((tensor for tensor in own if tensor.device.type == kind), ends[group.rank], strict=False):
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            sent[end : end + flat.numel()] = flat
        gathered = group.gather_tensor(sent) if sent.numel() else [sent] * group.size
        for forms, starts, got, bytes_ in zip(every, ends, found, gathered, strict=True):
            here = [index for index, form in enumerate(forms) if form[2] == kind]
            for index, start in zip(here, starts, strict=False):
                shape, dtype, _ = forms[index]
                got[index] = bytes_[start : start + _size(shape, dtype)].view(dtype).reshape(shape)
    return found


def _ends(forms: list[Form], kind: str) -> list[int]:
    """Where each tensor of a kind of device begins among the bytes, and where the last one ends."""
    ends = [0]
    for shape, dtype, own in forms:
        if own == kind:
            ends.append(ends[-1] + -(-_size(shape, dtype) // ALIGNED) * ALIGNED)
    return ends


def _size(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize
