import math

import pytest
import torch

from fts import transforms as tx
from fts.errors import ArgumentError
from tests.transforms.trajectories import copy, make_gradients, make_params


def test_scale_by_adam_by_hand():
    """Algorithm 1 of the paper, in Python numbers."""
    b1, b2, eps = 0.8, 0.9, 0.1
    transform = tx.scale_by_adam(b1, b2, eps)
    slopes = [0.5, -3.0, 2.0, 0.0]
    for update in (transform.update, transform.update_):
        state = transform.init({"w": torch.zeros(1, dtype=torch.float64)})
        m = v = 0.0
        for t, g in enumerate(slopes, start=1):
            updates, state, info = update({"w": torch.tensor([g], dtype=torch.float64)}, state, None)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            expected = m / (1 - b1**t) / (math.sqrt(v / (1 - b2**t)) + eps)
            assert updates["w"].item() == pytest.approx(expected, rel=1e-13)
            assert state.mu["w"].item() == pytest.approx(m, rel=1e-13)
            assert state.nu["w"].item() == pytest.approx(v, rel=1e-13)
            assert int(state.step) == t
            assert info == {}


def test_the_first_update_has_the_size_of_the_learning_rate():
    for make in (tx.adam, tx.adamw):
        transform, params = make(0.1, eps=0.0, **({"weight_decay": 0.0} if make is tx.adamw else {})), make_params()
        updates, _, info = transform.update(make_gradients(1)[0], transform.init(params), params)
        for update in updates.values():
            torch.testing.assert_close(update.abs(), torch.full_like(update, 0.1))
        assert info["lr"].item() == 0.1


@pytest.mark.parametrize("make", [tx.adam, tx.adamw])
def test_updates_in_place(make):
    params, gradients = make_params(), make_gradients(4)
    transform = make(tx.linear_schedule(0.1, 0.0, 10), weight_decay=0.1)
    state, fast = transform.init(params), transform.init(params)
    for grads in gradients:
        expected, state, info = transform.update(grads, state, params)
        found, fast, fast_info = transform.update_(copy(grads), fast, params)
        for name in params:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)
        assert fast_info["lr"] == info["lr"]


def test_only_weight_decay_needs_the_parameters():
    grads = make_gradients(1)[0]
    for transform in (tx.adam(0.1), tx.adamw(0.1, weight_decay=0.0)):
        transform.update(grads, transform.init(grads), None)
    for transform in (tx.adam(0.1, weight_decay=0.1), tx.adamw(0.1)):
        with pytest.raises(ArgumentError, match="with weight_decay needs the parameters"):
            transform.update(grads, transform.init(grads), None)


@pytest.mark.parametrize("make", [tx.adam, tx.adamw, lambda lr, **options: tx.scale_by_adam(**options)])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"b1": 1.0}, r"b1 must be a number in \[0, 1\), not 1.0"),
        ({"b1": -0.1}, "b1 must be .* not -0.1"),
        ({"b2": 2}, "b2 must be .* not 2"),
        ({"eps": -1e-8}, "eps must be .* not -1e-08"),
        ({"eps": math.nan}, "eps must be .* not nan"),
    ],
)
def test_errors(make, options, words):
    with pytest.raises(ArgumentError, match=words):
        make(0.1, **options)


@pytest.mark.parametrize("make", [tx.adam, tx.adamw])
def test_errors_of_the_rate_and_decay(make):
    with pytest.raises(ArgumentError, match=f"{make.__name__}: lr must be .* not -1"):
        make(-1)
    with pytest.raises(ArgumentError, match=f"{make.__name__}: weight_decay must be .* not -1"):
        make(0.1, weight_decay=-1)


def test_labels():
    assert tx.scale_by_adam().label == "scale_by_adam(b1=0.9, b2=0.999, eps=1e-08)"
    assert tx.adam(0.1).label == "adam(lr=0.1)"
    assert tx.adam(0.1, weight_decay=0.2).label == "adam(lr=0.1, weight_decay=0.2)"
    assert tx.adamw(3e-4).label == "adamw(lr=0.0003, weight_decay=0.01)"
    assert tx.adamw(0.1, mask=["w"]).label == "adamw(lr=0.1, weight_decay=0.01, mask='w')"
