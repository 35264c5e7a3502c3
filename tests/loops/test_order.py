import pytest
import torch
from hypothesis import given, strategies as st

from fts.loops.order import length_grouped


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=300), size=st.integers(1, 9), seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_grouping_by_length_is_that_of_transformers(lengths, size, seed, epoch):
    sampler = pytest.importorskip("transformers.trainer_pt_utils").LengthGroupedSampler
    theirs = sampler(size, lengths=lengths, generator=torch.Generator().manual_seed(seed + epoch))
    assert length_grouped(lengths, size, seed, epoch).tolist() == list(theirs)


def test_grouped_batches_need_less_padding():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))
    grouped = length_grouped(lengths, 10, seed=0, epoch=0)
    assert grouped.sort().values.equal(torch.arange(1000))
    assert lengths[grouped[0]] == lengths.max()

    def padded(order):
        return sum(10 * int(part.max()) for part in lengths[order].split(10))

    assert padded(grouped) < 1.1 * int(lengths.sum()) < padded(torch.arange(1000))
    assert not grouped.equal(length_grouped(lengths, 10, seed=0, epoch=1))


def test_nothing_can_be_grouped():
    assert length_grouped([], 4, seed=0, epoch=0).tolist() == []
