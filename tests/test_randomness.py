"""Counter-based randomness: distinct seeds, normal numbers that are a function of their counters."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fts.randomness import DATA, EVALUATION, STEP, fold_in, randn_like, seed_generators

try:  # installed with scikit-learn, which only the examples need
    from scipy import stats
except ImportError:
    stats = None

seeds = st.integers(-(2**70), 2**70)
small = st.integers(0, 2**40)


def test_no_two_positions_of_a_run_share_a_seed():
    seen = {
        fold_in(seed, use, step, micro)
        for seed in range(5)
        for use in (STEP, DATA, EVALUATION)
        for step in range(200)
        for micro in range(10)
    }
    assert len(seen) == 5 * 3 * 200 * 10


def test_shorter_and_longer_positions_differ():
    positions = [(), (0,), (0, 0), (0, 0, 0), (1,), (0, 1), (1, 0), (0, 0, 1)]
    assert len({fold_in(0, *position) for position in positions}) == len(positions)


@given(seeds, st.lists(small, max_size=4))
def test_fold_in_gives_a_seed_for_every_generator(seed, position):
    value = fold_in(seed, *position)
    assert 0 <= value < 2**63 and value == fold_in(seed, *position)
    torch.Generator().manual_seed(value)


@given(seeds, small, small)
def test_neighbouring_positions_give_unrelated_seeds(seed, step, micro):
    one, two = fold_in(seed, STEP, step, micro), fold_in(seed, STEP, step + 1, micro)
    assert 8 <= (one ^ two).bit_count() <= 56


def test_one_bit_of_the_seed_changes_half_of_the_bits():
    flips = [(fold_in(n, STEP, 0) ^ fold_in(n ^ (1 << bit), STEP, 0)).bit_count() for n in range(50) for bit in range(0, 64, 7)]
    assert 31 <= sum(flips) / len(flips) <= 32


def draws() -> list[float]:
    return [float(torch.rand(())), float(np.random.random()), random.random()]


@given(st.integers(0, 2**63 - 1))
def test_torch_numpy_and_python_are_all_seeded(seed):
    seed_generators(seed)
    first = draws()
    torch.rand(2), np.random.random(), random.random()
    seed_generators(seed)
    assert draws() == first
    seed_generators(seed ^ 1)
    assert all(one != two for one, two in zip(first, draws(), strict=True))


def test_numpy_is_seeded_by_all_bits_that_differ_in_practice():
    firsts = set()
    for step in range(1000):
        seed_generators(fold_in(0, STEP, step, 0))
        firsts.add(np.random.random())
    assert len(firsts) == 1000


@pytest.mark.parametrize("counters", [(), (0,), (1, 7)])
def test_normal_numbers_are_standard_normal(counters):
    x = randn_like(torch.empty(100_000, dtype=torch.float64), 3, *counters)
    n = len(x)
    assert x.isfinite().all()
    assert abs(float(x.mean())) < 5 / n**0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((x**3).mean())) < 5 * (15 / n) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 5 * (96 / n) ** 0.5
    assert stats is None or stats.kstest(x.numpy(), "norm").pvalue > 1e-3


def test_one_number_over_many_counters_is_standard_normal_too():
    """The numbers that add_noise draws for a 0-d parameter in a run."""
    x = np.array([float(randn_like(torch.empty((), dtype=torch.float64), 0, step)) for step in range(5_000)])
    assert stats is None or stats.kstest(x, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / len(x) ** 0.5


@pytest.mark.parametrize(
    ("one", "two"), [((0, 1), (0, 2)), ((0, 1), (1, 1)), ((0, 0, 1), (0, 1, 0)), ((0,), (0, 0)), ((5, 2, 3), (5, 3, 2))]
)
def test_streams_of_different_seeds_and_counters_are_unrelated(one, two):
    like = torch.empty(20_000, dtype=torch.float64)
    x, y = randn_like(like, *one), randn_like(like, *two)
    assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < 5 / len(x) ** 0.5
    # no stream is a shifted copy of another
    assert not set(x[:2000].tolist()) & set(y.tolist())


def test_neighbours_in_a_tensor_are_unrelated():
    x = randn_like(torch.empty(100_000, dtype=torch.float64), 1, 1)
    for lag in (1, 2, 3, 64):
        assert abs(float((x[:-lag] * x[lag:]).mean())) < 5 / len(x) ** 0.5


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, 2**62), max_size=3),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_normal_numbers_are_a_function_of_their_arguments(seed, counters, shape, dtype):
    like = torch.empty(shape, dtype=dtype)
    before = torch.get_rng_state()
    x = randn_like(like, seed, *counters)
    assert torch.equal(torch.get_rng_state(), before)
    assert x.shape == like.shape and x.dtype == dtype and x.isfinite().all()
    assert torch.equal(x, randn_like(like, seed, *map(torch.tensor, counters)))


def test_a_prefix_does_not_depend_on_the_length():
    assert torch.equal(randn_like(torch.empty(5), 0, 1), randn_like(torch.empty(50), 0, 1)[:5])


def test_normal_numbers_under_vmap():
    like, steps = torch.zeros(3, 4), torch.arange(5)
    many = torch.vmap(lambda step: randn_like(like, 7, step))(steps)
    assert torch.equal(many, torch.stack([randn_like(like, 7, int(step)) for step in steps]))
    over_both = torch.vmap(lambda x, step: randn_like(x, 7, step))(torch.zeros(5, 3, 4), steps)
    assert torch.equal(over_both, many)


def test_normal_numbers_in_a_graph_that_is_made_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(lambda x, step: randn_like(x, 7, step), fullgraph=True, dynamic=False, backend=backend)
    like = torch.zeros(3, 4)
    for step in range(4):
        assert torch.equal(traced(like, torch.tensor(step)), randn_like(like, 7, step))
    assert len(graphs) == 1
