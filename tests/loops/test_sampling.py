import random

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fts.loops import sampling
from fts.loops.sampling import length_grouped_indices, sampled_order
from fts.randomness import get_rng_states, rng_states_equal, seed_generators


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=300), size=st.integers(1, 9), seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_grouping_by_length_is_that_of_transformers(lengths, size, seed, epoch):
    sampler = pytest.importorskip("transformers.trainer_pt_utils").LengthGroupedSampler
    theirs = sampler(size, lengths=lengths, generator=torch.Generator().manual_seed(seed + epoch))
    assert length_grouped_indices(lengths, size, seed, epoch).tolist() == list(theirs)


def test_grouped_batches_need_less_padding():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))
    grouped = length_grouped_indices(lengths, 10, seed=0, epoch=0)
    assert grouped.sort().values.equal(torch.arange(1000))
    assert lengths[grouped[0]] == lengths.max()

    def padded(indices):
        return sum(10 * int(part.max()) for part in lengths[indices].split(10))

    assert padded(grouped) < 1.1 * int(lengths.sum()) < padded(torch.arange(1000))
    assert not grouped.equal(length_grouped_indices(lengths, 10, seed=0, epoch=1))


def test_nothing_can_be_grouped():
    assert length_grouped_indices([], 4, seed=0, epoch=0).tolist() == []


class Drawing:
    """Draws from all generators: permutations that are given from lists, and single numbers between them."""

    def __init__(self, plain):
        self.plain = plain

    def __len__(self):
        return 18

    def __iter__(self):
        for _ in range(2):
            drawn = [*torch.randperm(4).tolist(), *np.random.permutation(4).tolist()]
            if self.plain:
                yield from (index for index in drawn)
            else:
                yield from drawn
            yield random.randrange(9)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_generators_are_only_swapped_where_a_sampler_may_draw(size, monkeypatch):
    seed_generators(5)
    before = get_rng_states(torch.device("cpu"))
    entered = []
    enter = sampling.IsolatedGenerators.__enter__
    monkeypatch.setattr(sampling.IsolatedGenerators, "__enter__", lambda self: entered.append(enter(self)))
    found = list(sampled_order(Drawing(plain=False), size, seed=0, drop_last=False)(0, 0))
    swaps = len(entered)
    assert found == list(sampled_order(Drawing(plain=True), size, seed=0, drop_last=False)(0, 0))
    assert swaps <= len(entered) - swaps
    assert swaps < 18 // size or size > 2
    assert rng_states_equal(before, get_rng_states(torch.device("cpu")))
    listed = list(sampled_order(list(range(18)), size, seed=0, drop_last=False)(0, 0))
    assert [index for batch in listed for index in batch] == list(range(18))
