"""tx.skip_spikes: which norms are spikes, and what is left out where one is."""

import math

import numpy as np
import pytest
import torch

import fts
from fts import loops, steps, transforms as tx
from fts.errors import ArgumentError, SpikeError
from tests.transforms.trajectories import assert_close, by_apply, by_update, make_gradients, make_params


def optimizer():
    return tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(0.1))


def of_norm(norm: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([0.6, 0.8], dtype=torch.float64) * norm}


def flags(transform, norms) -> tuple[list[int], tx.SpikeState]:
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    state, found = transform.init(params), []
    for norm in norms:
        _, state, info = transform.update(of_norm(norm), state, params)
        found.append(int(info["spike"]))
    return found, state


def test_mean_and_deviation_are_those_of_numpy_while_all_weigh_the_same():
    norms = np.random.default_rng(0).uniform(0.5, 1.5, size=40)
    found, state = flags(tx.skip_spikes(tx.sgd(0.1), decay=0.99, warmup_steps=50), norms)
    assert not any(found)
    assert float(state.norms.mean) == pytest.approx(norms.mean(), rel=1e-12)
    assert float(state.norms.variance) == pytest.approx(norms.var(), rel=1e-12)


def test_later_on_old_norms_fade():
    norms = [1.0] * 30 + [1.1] * 200
    _, state = flags(tx.skip_spikes(tx.sgd(0.1), threshold=100, decay=0.9), norms)
    assert float(state.norms.mean) == pytest.approx(1.1, abs=1e-8)
    weights = 0.1 * 0.9 ** np.arange(200)  # by its definition, from the newest to the oldest
    assert float(state.norms.mean) == pytest.approx(weights.sum() * 1.1 + 0.9**200 * 1.0, rel=1e-12)


@pytest.mark.parametrize(("norm", "spike"), [(1.29, 0), (1.31, 1), (0.0, 0), (math.inf, 1), (math.nan, 1)])
def test_the_bound_is_so_many_deviations_above_the_mean(norm, spike):
    transform = tx.skip_spikes(tx.sgd(0.1), threshold=6.0, warmup_steps=10)
    found, state = flags(transform, [1.0] * 10 + [norm])  # without spread, the deviation counts as 0.05 of the mean
    assert found == [0] * 10 + [spike]
    assert int(state.norms.seen) == 11 - spike


def test_a_spread_of_the_norms_widens_the_bound():
    norms = [0.5, 1.5] * 10  # mean 1, deviation 0.5
    assert flags(tx.skip_spikes(tx.sgd(0.1), threshold=3.0, warmup_steps=20), [*norms, 2.49])[0][-1] == 0
    assert flags(tx.skip_spikes(tx.sgd(0.1), threshold=3.0, warmup_steps=20), [*norms, 2.51])[0][-1] == 1


def test_nothing_finite_is_a_spike_in_the_warmup():
    assert flags(tx.skip_spikes(tx.sgd(0.1), warmup_steps=4), [1.0, 1e6, math.nan, 1e-6])[0] == [0, 0, 1, 0]


@pytest.mark.parametrize("run", [by_update, by_apply])
def test_spikes_are_left_out_as_if_they_had_not_been(run):
    params, gradients = make_params(), make_gradients(8)
    large = [{name: 1e4 * g for name, g in grads.items()} for grads in make_gradients(2, seed=9)]
    transform = tx.skip_spikes(optimizer(), warmup_steps=3)
    with_spikes = [*gradients[:5], large[0], *gradients[5:7], large[1], gradients[7]]
    found, state, info = run(transform, params, with_spikes)
    expected, state_without, info_without = run(transform, params, gradients)
    assert_close(found, expected, rtol=0, atol=0)
    assert_close((state.inner, state.norms), (state_without.inner, state_without.norms), rtol=0, atol=0)
    assert [int(info[key]) for key in ("spike", "spikes_total", "spikes_in_a_row")] == [0, 2, 0]
    assert [int(info_without[key]) for key in ("spike", "spikes_total", "spikes_in_a_row")] == [0, 0, 0]


@pytest.mark.parametrize("run", [by_update, by_apply])
def test_the_limit_raises_when_it_is_reached(run):
    transform = tx.skip_spikes(optimizer(), warmup_steps=2, limit=2)
    gradients = make_gradients(3)
    large = [{name: 1e4 * g for name, g in grads.items()} for grads in make_gradients(2, seed=9)]
    transform.check(run(transform, make_params(), [*gradients, large[0]])[2])
    with pytest.raises(SpikeError, match=r"threshold 6\) in 2 updates in a row \(limit 2, 2 in all\).*Look at the batches"):
        transform.check(run(transform, make_params(), [*gradients, *large])[2])


def test_a_run_goes_back_behind_a_spike():
    """`with_rollback` with limit=1: the run is the one on data without the batch that made the spike."""

    def run(data):
        transform = tx.skip_spikes(tx.sgd(0.01), warmup_steps=3, limit=1)
        step = steps.train_step(lambda params, batch: (params["w"] * batch).sum(), transform)
        state = fts.TrainState.create({"w": torch.ones(2)}, transform)
        events = list(
            loops.with_rollback(
                lambda state, start: loops.fit(step, state, data, start=start, donate=False), state, loops.RollbackPolicy(every=1)
            )
        )
        return events[-1].state, [event.step for event in events if isinstance(event, loops.RolledBack)]

    good = [torch.tensor([1.0, 1.0 + 0.01 * i]) for i in range(8)]
    state, back = run([*good[:5], torch.tensor([500.0, 500.0]), *good[5:]])
    expected, none = run(good)
    assert (back, none) == ([5], [])
    assert torch.equal(state.params["w"], expected.params["w"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0}, r"threshold must be a number in \(0, inf\), not 0"),
        ({"decay": 1.0}, r"decay must be a number in \[0, 1\), not 1.0"),
        ({"warmup_steps": 0}, "warmup_steps must be an integer of at least 1, not 0"),
        ({"limit": 0}, "limit must be an integer of at least 1, not 0"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ArgumentError, match=words):
        tx.skip_spikes(tx.sgd(0.1), **options)


def test_it_wraps_transforms_only():
    with pytest.raises(ArgumentError, match=r"skip_spikes takes transforms, not 0\.1"):
        tx.skip_spikes(0.1)
