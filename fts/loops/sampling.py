"""The order of examples and batches: a function of the seed and the epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import count, islice
from operator import length_hint
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from fts.randomness import DATA, fold_in, seed_generators

Indices: TypeAlias = Any
"""The indices of one batch: a tensor or a list, or a single index where a fetch asks for one example."""

Order: TypeAlias = Callable[[int, int], Iterator[Indices]]
"""`(epoch, start)` -> the indices of each batch, from batch `start` on."""

BATCHES_PER_BLOCK = 1024
"""Indices are split into so many batches at a time, so that an epoch of millions does not start with a pause."""


def permutation(num_examples: int, seed: int, epoch: int) -> Tensor:
    """The order of the examples in a shuffled epoch.

    Args:
        num_examples: how many there are.
        seed: the seed of the order.
        epoch: which epoch, from 0.

    Returns:
        `torch.randperm(num_examples)` under a CPU generator seeded with `seed + epoch`: int64, shape (num_examples,).

    >>> torch.equal(permutation(9, seed=0, epoch=3), permutation(9, seed=3, epoch=0))
    True
    """
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(num_examples, generator=generator)


def length_grouped_indices(lengths: Sequence[int] | Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
    """A shuffled order in which neighbours have similar lengths, so that batches need little padding.

    The shuffled examples are split into groups of 50 batches (fewer where that would be less than four groups); each group is
    sorted, the longest first. The longest example of all comes first, so that a lack of memory shows at once.

    Args:
        lengths: of each example.
        batch_size: how many neighbours should be similar.
        seed: the seed of the order.
        epoch: which epoch, from 0.

    Returns:
        Each index once: int64, shape (num_examples,). As transformers' LengthGroupedSampler under a generator seeded with
        `seed + epoch`.

    >>> length_grouped_indices([10, 2, 30, 4, 50], batch_size=5, seed=0, epoch=0).tolist()
    [4, 2, 0, 3, 1]
    """
    sizes = torch.as_tensor(lengths)
    group = batch_size * max(1, min(len(sizes) // (4 * batch_size), 50))
    groups = [_longest_first(part, sizes) for part in torch.split(permutation(len(sizes), seed, epoch), group)]
    if not len(sizes):
        return groups[0]
    order = torch.cat(groups)
    longest = int(sizes[order[::group]].argmax()) * group  # each group begins with its longest
    ends = torch.tensor([0, longest])
    order[ends] = order[ends.flip(0)]
    return order


def _longest_first(indices: Tensor, sizes: Tensor) -> Tensor:
    return indices[torch.sort(sizes[indices], descending=True, stable=True).indices]


class EpochSampler(Sampler[int]):
    """A sampler whose order is a function of a seed and an epoch; each complete pass moves it to the next epoch.

    In a DataLoader that is given to `source`, the seed of the source is used instead.

    Args:
        order: `(seed, epoch)` -> the indices of that epoch: int64, shape (num_examples,).
        num_examples: how many indices an epoch has.
        seed: the seed of the order.

    >>> sampler = EpochSampler(lambda seed, epoch: permutation(4, seed, epoch), num_examples=4, seed=5)
    >>> first, second = list(sampler), list(sampler)
    >>> second == permutation(4, seed=5, epoch=1).tolist()
    True
    """

    def __init__(self, order: Callable[[int, int], Tensor], num_examples: int, seed: int = 0) -> None:
        self.order = order
        self.num_examples = num_examples
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_examples

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        yield from self.order(self.seed, epoch).tolist()
        self.epoch = epoch + 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch


def regular_order(num_examples: int, batch_size: int | None, *, shuffle: bool, seed: int, drop_last: bool) -> Order:
    """All examples, shuffled or in sequence, in batches of `batch_size`; with None, one by one."""

    def indices(seed: int, epoch: int) -> Tensor:
        return permutation(num_examples, seed, epoch) if shuffle else torch.arange(num_examples)

    return batch_order(indices, num_examples, batch_size, seed=seed, drop_last=drop_last)


def batch_order(
    order_of: Callable[[int, int], Tensor], num_examples: int, batch_size: int | None, *, seed: int, drop_last: bool
) -> Order:
    """The order of an `EpochSampler` at another seed, in batches of `batch_size`; with None, one by one."""

    def order(epoch: int, start: int) -> Iterator[Indices]:
        indices = order_of(seed, epoch)
        if batch_size is None:
            yield from indices[start:].tolist()
            return
        stop = num_examples // batch_size * batch_size if drop_last else num_examples
        for first in range(start * batch_size, stop, BATCHES_PER_BLOCK * batch_size):
            yield from torch.split(indices[first : min(first + BATCHES_PER_BLOCK * batch_size, stop)], batch_size)

    return order


def sampled_order(sampler: Iterable[Any], batch_size: int | None, *, seed: int, drop_last: bool) -> Order:
    """The order of a custom sampler, in batches; with `batch_size` None, its elements as they are.

    The sampler uses generators that are seeded with `fold_in(seed, DATA, epoch)` and isolated from all others. So its order is a
    function of the two. Skipped indices are drawn again; their data is not read.
    """

    def order(epoch: int, start: int) -> Iterator[Indices]:
        for holder in _nested(sampler):
            set_epoch(holder, epoch)
            own = getattr(holder, "generator", None)
            if isinstance(own, torch.Generator):
                own.manual_seed(fold_in(seed, DATA, epoch))
        generators = IsolatedGenerators(fold_in(seed, DATA, epoch))
        with generators:
            indices = iter(sampler)
        wanted = 1 if batch_size is None else batch_size
        for number in count():
            # entering costs 0.2 ms, most of it numpy's
            with generators if _stored(indices) < wanted else nullcontext():
                found = list(islice(indices, wanted))
            if not found or (drop_last and batch_size is not None and len(found) < batch_size):
                return
            if number >= start:
                yield found[0] if batch_size is None else found

    return order


_LISTED: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter(range(0))))


def _stored(iterator: Iterator[Any]) -> int:
    """The least number of elements that an iterator yields without running any code, as a generator in `yield from` a list."""
    inner = getattr(iterator, "gi_yieldfrom", None) if isinstance(iterator, Generator) else iterator
    return length_hint(inner) if type(inner) in _LISTED else 0


def _nested(sampler: Any) -> Iterator[Any]:
    """A sampler and those inside it: batch samplers have a sampler, those of accelerate a batch sampler."""
    while sampler is not None:
        yield sampler
        inner = getattr(sampler, "batch_sampler", None)
        sampler = getattr(sampler, "sampler", None) if inner is None else inner


def set_epoch(holder: Any, epoch: int) -> None:
    """Call `set_epoch` where a sampler or dataset has one, unless its `epoch` is set already.

    `datasets` keeps its epoch in memory that workers share, and two workers that set it at once can corrupt it.
    """
    set_epoch = getattr(holder, "set_epoch", None)
    if callable(set_epoch) and getattr(holder, "epoch", None) != epoch:
        set_epoch(epoch)


class IsolatedGenerators:
    """A context with its own state of the global random generators, which continues when it is entered again.

    >>> generators = IsolatedGenerators(seed=7)
    >>> with generators:
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
