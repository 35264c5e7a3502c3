"""What an engine asks of the other processes that take the same step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from fts.state import TrainState
from fts.typing import LossOutput, Params


def number_of(index: int, among: Collectives | None) -> int:
    """The number of this process's micro-batch `index` among those of all, which its randomness is keyed by.

    >>> number_of(3, None)
    3
    """
    return index if among is None else index * among.size + among.rank


class Collectives(Protocol):
    """One process among several, each with micro-batches of its own; `fts.distributed` has them.

    The gradient of a step is `sum(w * g) / sum(w)` over the micro-batches of all of them. Each process has equally many.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are. Micro-batch i of process r is number `i * size + r` of the step.
        reduces: whether a backward pass leaves the mean over the processes in the gradients; otherwise `mean` makes it.
        carrier: a leaf of the loss's graph whose gradient is no parameter's, but what `summing` was given; None if there is none.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def reduces(self) -> bool: ...

    @property
    def carrier(self) -> Tensor | None: ...

    def summing(self, sums: Tensor) -> Callable[[], Tensor]:
        """Begin the sum over the processes of what `sums_of` gives; what is returned has it after the next backward pass."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor, as a new one; it may stand in a graph."""
        ...

    def mean(self, grads: Params) -> Params:
        """The mean over the processes of gradients, which may be overwritten; it may stand in a graph."""
        ...

    def same(self, buffers: Params) -> Params:
        """The buffers that a forward pass has written, made the same in all processes."""
        ...

    def check(self, state: TrainState) -> None:
        """Raise where the processes do not begin with the same parameters; called before each step, and quick after the first."""
        ...

    def forward(self, run: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
        """The loss, run so that its backward pass exchanges gradients."""
        ...

    def exchanging(self, now: bool) -> AbstractContextManager[Any]:
        """A context for a forward and backward pass that exchanges gradients, or only gathers them."""
        ...
