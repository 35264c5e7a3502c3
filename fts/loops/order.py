"""In which order items are visited: a function of the seed and the epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fts.randomness import DATA, fold, seed_generators

Indices: TypeAlias = Any
"""What one batch is made of: a tensor or list of indices, or a single index where a fetch asks for one item."""

Order: TypeAlias = Callable[[int, int], Iterator[Indices]]
"""`(epoch, start)` -> the indices of each batch, from batch `start` on."""

BLOCK = 1024
"""How many batches of indices are cut at a time, so that an epoch of millions does not start with a pause."""


def permutation(items: int, seed: int, epoch: int) -> Tensor:
    """The order in which a shuffled epoch visits its items.

    Args:
        items: how many there are.
        seed: the seed of the order.
        epoch: which epoch, from 0.

    Returns:
        `torch.randperm(items)` under a CPU generator seeded with `seed + epoch`: int64, shape (items,).

    >>> torch.equal(permutation(9, seed=0, epoch=3), permutation(9, seed=3, epoch=0))
    True
    """
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(items, generator=generator)


def regular_order(items: int, batch_size: int | None, *, shuffle: bool, seed: int, drop_last: bool) -> Order:
    """All items, shuffled or in sequence, cut into batches of `batch_size`; with None, item by item."""

    def order(epoch: int, start: int) -> Iterator[Indices]:
        indices = permutation(items, seed, epoch) if shuffle else torch.arange(items)
        if batch_size is None:
            yield from indices[start:].tolist()
            return
        stop = items // batch_size * batch_size if drop_last else items
        for first in range(start * batch_size, stop, BLOCK * batch_size):
            yield from torch.split(indices[first : min(first + BLOCK * batch_size, stop)], batch_size)

    return order


def sampled_order(sampler: Iterable[Any], batch_size: int | None, *, seed: int, drop_last: bool) -> Order:
    """The order of a custom sampler, cut into batches; with `batch_size` None what it gives is taken as it comes.

    The sampler draws from generators that are seeded with `fold(seed, DATA, epoch)` and kept apart from everyone else's. So its
    order is a function of the two. Skipped indices are drawn again; their data is not read.
    """

    def order(epoch: int, start: int) -> Iterator[Indices]:
        for holder in (sampler, getattr(sampler, "sampler", None)):
            announce_epoch(holder, epoch)
            own = getattr(holder, "generator", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(fold(seed, DATA, epoch))
        apart = Apart(fold(seed, DATA, epoch))
        with apart:
            indices = iter(sampler)
        for number in count():
            with apart:
                found = list(islice(indices, 1 if batch_size is None else batch_size))
            if not found or (drop_last and batch_size is not None and len(found) < batch_size):
                return
            if number >= start:
                yield found[0] if batch_size is None else found

    return order


def announce_epoch(holder: Any, epoch: int) -> None:
    """Call `set_epoch` where a sampler or dataset has one, unless it says by its `epoch` that it knows.

    `datasets` keeps its epoch in memory that workers share, and two that set it at once can get it wrong.
    """
    set_epoch = getattr(holder, "set_epoch", None)
    if callable(set_epoch) and getattr(holder, "epoch", None) != epoch:
        set_epoch(epoch)


class Apart:
    """A context in which the global generators are private ones, which go on where they were when it is entered again.

    >>> apart = Apart(seed=7)
    >>> with apart:
    ...     inside = random.random()
    >>> random.seed(7)
    >>> inside == random.random()
    True
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner: Any = None
        self._outer: Any = None

    def __enter__(self) -> None:
        self._outer = _states()
        if self._inner is None:
            seed_generators(self._seed)
        else:
            _restore(self._inner)

    def __exit__(self, *error: object) -> None:
        self._inner = _states()
        _restore(self._outer)


def _states() -> tuple[Any, ...]:
    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, ...]) -> None:
    torch.default_generator.set_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
