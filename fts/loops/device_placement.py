"""Batches on the device where a step computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from fts.loops.source import Source
from fts.steps import MicroBatches, PaddingBatch
from fts.typing import Batch


def on_device(source: Source, device: torch.device | str) -> Source:
    """The same source with its batches' tensors on a device.

    Args:
        source: made by `fts.loops.source`, with `pin_memory=True` to copy asynchronously.
        device: such as "cuda"; for the CPU the source is returned as it is.

    Returns:
        A source.

    >>> from fts import loops
    >>> [batch.device for batch in on_device(loops.source([torch.ones(1)]), "meta").epoch(0)]
    [device(type='meta')]
    """
    target = torch.device(device)
    if target.type == "cpu":
        return source

    def batches(epoch: int, start: int, **kwargs: Any) -> Iterator[Batch]:
        return (send_to_device(batch, target) for batch in source.batches(epoch, start, **kwargs))

    return attrs.evolve(source, batches=batches)


def send_to_device(tree: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, in the same containers; a mapping becomes a dict."""
    if isinstance(tree, Tensor):
        return tree.to(device, non_blocking=True)
    if isinstance(tree, Mapping):
        return {key: send_to_device(value, device) for key, value in tree.items()}
    if isinstance(tree, PaddingBatch):
        return PaddingBatch(send_to_device(tree.batch, device))
    if isinstance(tree, MicroBatches):
        return MicroBatches(send_to_device(value, device) for value in tree)
    if isinstance(tree, (list, tuple)):
        parts = [send_to_device(value, device) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
