"""The collectives that a gradient engine uses, as a protocol; `fts.distributed` implements it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from fts.state import TrainState
from fts.typing import LossOutput, Params


def global_microbatch_index(index: int, collectives: Collectives | None) -> int:
    """The global index of a local micro-batch, which seeds its random numbers.

    >>> global_microbatch_index(3, None)
    3
    """
    return index if collectives is None else index * collectives.size + collectives.rank


class Collectives(Protocol):
    """A data-parallel group: each rank has its own micro-batches, and all have equally many.

    The gradient of a step is `sum(w * g) / sum(w)` over the micro-batches of all ranks.

    Attributes:
        rank: of this process, from 0.
        size: the world size. Micro-batch i of rank r has the index `i * size + r` in the step.
        reduces_in_backward: whether the backward pass averages the gradients over all ranks; otherwise `average_gradients` does.
        metrics_parameter: a leaf of the loss's graph that is no parameter of the model: its gradient is the all-reduced tensor
            of `all_reduce_async`. None where that tensor has an all-reduce of its own.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def reduces_in_backward(self) -> bool: ...

    @property
    def metrics_parameter(self) -> Tensor | None: ...

    def all_reduce_async(self, sums: Tensor) -> Callable[[], Tensor]:
        """Start an all-reduce of `weighted_sums`; call the returned function for the result, after the next backward pass."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, as a new tensor; can be traced."""
        ...

    def average_gradients(self, grads: Params) -> Params:
        """The mean of gradients over all ranks; may overwrite them; can be traced."""
        ...

    def sync_buffers(self, buffers: Params) -> Params:
        """Make the buffers that a forward pass has written the same on all ranks."""
        ...

    def check(self, state: TrainState) -> None:
        """Raise unless all ranks start with the same parameters; called before each step, and quick after the first."""
        ...

    def wrap_forward(self, forward: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
        """Wrap the forward pass, so that the backward pass reduces gradients."""
        ...

    def gradient_sync(self, enabled: bool) -> AbstractContextManager[Any]:
        """A context for a forward and backward pass that synchronizes gradients, or only accumulates them (`no_sync`)."""
        ...
