"""Gradients of parameters that are cut into shards, one for each process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fts.distributed.group import Group
from fts.typing import LossOutput, Params


class Sharded:
    """What an engine asks of processes that hold a module under `fully_shard`.

    Args:
        group: the processes.
        module: the module.
        each_batch: whether gradients are scattered after each micro-batch.
    """

    reduces = True

    def __init__(self, group: Group, module: nn.Module, each_batch: bool = False) -> None:
        self.group = group
        self.rank = group.rank
        self.size = group.size
        self.module: Any = module
        self.each_batch = each_batch

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Group.sum`."""
        return self.group.sum(tensor)

    def mean(self, grads: Params) -> Params:
        """Nothing is left to do."""
        return grads

    def same(self, buffers: Params) -> Params:
        """Those of the first process."""
        self.group.copy_first(list(buffers.values()))
        return buffers

    def check(self, params: Params) -> None:
        """Shards are parts of the same parameters by themselves."""

    def forward(self, run: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
        """The loss as it is: hooks in the module gather and scatter."""
        return run

    @contextmanager
    def exchanging(self, now: bool) -> Iterator[None]:
        """Gradients are scattered in the last pass only, unless they are after each."""
        for part in self.module.modules():
            if hasattr(part, "set_requires_gradient_sync"):
                part.set_requires_gradient_sync(now or self.each_batch, recurse=False)
                part.set_is_last_backward(now)
        yield
