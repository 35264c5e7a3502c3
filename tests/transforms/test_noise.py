import math

import pytest
import torch

from fts import transforms as tx
from fts.errors import ArgumentError
from tests.transforms.trajectories import by_update, make_gradients, make_params

ZEROS = {"a": torch.zeros(200, 500), "b": torch.zeros(100_000)}


def noise_of(transform, steps):
    state, found = transform.init(ZEROS), []
    for _ in range(steps):
        updates, state, info = transform.update(ZEROS, state, None)
        assert info == {}
        found.append(updates)
    assert int(state.step) == steps
    return found


def test_variance_decays_as_in_the_paper():
    for t, noise in enumerate(noise_of(tx.add_noise(0.3, 0.55, seed=1), 6)):
        expected = 0.3 / (1 + t) ** 0.55
        for tensor in noise.values():
            assert tensor.mean().item() == pytest.approx(0.0, abs=5 * math.sqrt(expected / 1e5))
            assert tensor.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / 1e5))


def test_noise_is_independent_over_steps_parameters_and_seeds():
    first, second = noise_of(tx.add_noise(1.0, 0.0, seed=1), 2)
    (other,) = noise_of(tx.add_noise(1.0, 0.0, seed=2), 1)
    streams = torch.stack(
        [first["a"].flatten(), first["b"], second["a"].flatten(), second["b"], other["a"].flatten(), other["b"]]
    )
    correlations = torch.corrcoef(streams) - torch.eye(6)
    assert correlations.abs().max().item() < 5 / math.sqrt(1e5)


def test_noise_is_a_function_of_seed_and_step():
    for one, two in zip(noise_of(tx.add_noise(1.0, 0.5, seed=1), 3), noise_of(tx.add_noise(1.0, 0.5, seed=1), 3), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in ZEROS)
    state = torch.get_rng_state()
    noise_of(tx.add_noise(1.0, 0.5, seed=1), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_added():
    params, gradients = make_params(), make_gradients(1)
    updates, _, _ = by_update(tx.add_noise(0.0, 0.5, seed=0), params, gradients)
    for name, p in params.items():
        torch.testing.assert_close(updates[name], p + gradients[0][name])


def test_centralize():
    grads = {
        "w": torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]),
        "kernel": torch.randn(4, 3, 2, 2),
        "b": torch.tensor([1.0, 5.0]),
        "s": torch.tensor(2.0),
    }
    updates, state, info = tx.centralize().update(grads, (), None)
    assert updates["w"].tolist() == [[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]
    torch.testing.assert_close(updates["kernel"].sum(dim=(1, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    assert updates["b"].tolist() == [1.0, 5.0] and updates["s"].item() == 2.0
    assert state == () and info == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tx.add_noise(-1.0, 0.5, 0), r"add_noise: eta must be a number in \[0, inf\), not -1.0"),
        (lambda: tx.add_noise(1.0, math.nan, 0), "gamma must be .* not nan"),
        (lambda: tx.add_noise(1.0, 0.5, 0.5), "seed must be an integer, not 0.5"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_labels():
    assert tx.add_noise(0.01, 0.55, seed=3).label == "add_noise(0.01, 0.55, seed=3)"
    assert tx.centralize().label == "centralize()"
