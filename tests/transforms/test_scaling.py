import math

import pytest
import torch

from fts import transforms as tx
from fts.errors import ArgumentError
from tests.transforms.trajectories import copy

PARAMS = {"w": torch.tensor([10.0, 20.0]), "b": torch.tensor(3.0)}
GRADS = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor(4.0)}


def both(transform, steps=1):
    """The updates of the last of some steps, by update and by update_."""
    for update in (transform.update, transform.update_):
        state = transform.init(PARAMS)
        for _ in range(steps):
            updates, state, info = update(copy(GRADS), state, PARAMS)
        yield {name: u.tolist() for name, u in updates.items()}, state, info


def test_scale():
    for updates, state, info in both(tx.scale(-0.5)):
        assert updates == {"w": [-0.5, 1.0], "b": -2.0}
        assert state == () and info == {}
    for updates, _, _ in both(tx.scale(torch.tensor(-0.5, dtype=torch.float64))):
        assert updates == {"w": [-0.5, 1.0], "b": -2.0}


def test_set_to_zero():
    transform = tx.set_to_zero()
    bad = {"w": torch.tensor([math.nan, math.inf])}
    for update in (transform.update, transform.update_):
        assert update(copy(bad), (), None)[0]["w"].tolist() == [0.0, 0.0]
    params, _, _ = transform.apply(copy(bad), (), {"w": torch.ones(2)})
    assert params["w"].tolist() == [1.0, 1.0]


def test_scale_by_schedule_counts_from_zero():
    for updates, state, info in both(tx.scale_by_schedule(lambda step: -1.0 - step), steps=3):
        assert updates == {"w": [-3.0, 6.0], "b": -12.0}
        assert int(state.step) == 3 and state.step.dtype == torch.int64
        assert info == {}


def test_scale_by_learning_rate():
    for updates, state, info in both(tx.scale_by_learning_rate(0.5), steps=2):
        assert updates == {"w": [-0.5, 1.0], "b": -2.0}
        assert state == ()
        assert info["lr"].item() == 0.5
    for updates, state, info in both(tx.scale_by_learning_rate(tx.linear_schedule(0.0, 1.0, 2)), steps=2):
        assert updates == {"w": [-0.5, 1.0], "b": -2.0}
        assert int(state.step) == 2
        assert info["lr"].item() == 0.5


def test_a_learning_rate_may_be_a_tensor():
    rate = torch.tensor(0.5, requires_grad=True)
    for make in (tx.scale_by_learning_rate, tx.sgd, tx.adam, tx.adamw):
        transform = make(rate)
        updates, _, info = transform.update(GRADS, transform.init(PARAMS), PARAMS)
        (slope,) = torch.autograd.grad(updates["w"].sum(), rate)
        assert slope.isfinite()
        assert not info["lr"].requires_grad
        with torch.no_grad():
            fast, _, _ = tx.chain(transform).apply(copy(GRADS), transform_state(transform), copy(PARAMS))
        torch.testing.assert_close(fast["w"], PARAMS["w"] + updates["w"].detach(), rtol=1e-6, atol=0)
        rates = torch.tensor([0.1, 0.2])
        updates = torch.vmap(lambda r, make=make: make(r).update(GRADS, make(r).init(PARAMS), PARAMS)[0]["b"])(rates)
        torch.testing.assert_close(updates[1], 2 * updates[0])


def transform_state(transform):
    return (transform.init(PARAMS),)


def test_add_decayed_weights():
    for updates, _, _ in both(tx.add_decayed_weights(0.5)):
        assert updates == {"w": [6.0, 8.0], "b": 5.5}
    for mask in (["w"], {"w": True, "b": False}, lambda name, p: p.ndim == 1):
        for updates, _, _ in both(tx.add_decayed_weights(0.5, mask)):
            assert updates == {"w": [6.0, 8.0], "b": 4.0}
    for updates, _, _ in both(tx.add_decayed_weights(0.5, lambda name, p: False)):
        assert updates == {"w": [1.0, -2.0], "b": 4.0}
    with pytest.raises(ArgumentError, match="add_decayed_weights needs the parameters"):
        tx.add_decayed_weights(0.5).update(GRADS, (), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_no_update_changes_dtype(dtype):
    grads = {name: g.to(dtype) for name, g in GRADS.items()}
    schedule = tx.cosine_schedule(0.1, warmup_steps=2, total_steps=5)
    for transform in (
        tx.scale(torch.tensor(0.1, dtype=torch.float64)), tx.scale_by_schedule(schedule), tx.scale_by_learning_rate(schedule),
        tx.sgd(schedule, momentum=0.9, dampening=0.1, weight_decay=0.1), tx.adam(schedule, weight_decay=0.1), tx.adamw(schedule),
        tx.clip_by_global_norm(1.0), tx.clip_by_block_rms(1.0), tx.adaptive_clip(0.1), tx.add_noise(0.1, 0.5, 0),
        tx.ema_params(tx.sgd(schedule), 0.9, debias=True), tx.skip_nonfinite(tx.sgd(0.1)), tx.multi_steps(tx.sgd(0.1), 2),
    ):  # fmt: skip
        updates, _, _ = transform.update(grads, transform.init(grads), grads)
        assert {u.dtype for u in updates.values()} == {dtype}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tx.scale(math.nan), r"scale: factor must be a number in \(-inf, inf\), not nan"),
        (lambda: tx.scale("2"), "not '2'"),
        (lambda: tx.scale_by_schedule(0.1), "takes a function of the step, not 0.1; use scale"),
        (lambda: tx.scale_by_learning_rate(-0.1), r"lr must be a number in \[0, inf\), not -0.1"),
        (lambda: tx.scale_by_learning_rate(math.inf), "lr must be .* not inf"),
        (lambda: tx.scale_by_learning_rate(None), "lr must be .* not None"),
        (lambda: tx.add_decayed_weights(-0.1), "weight_decay must be .* not -0.1"),
        (lambda: tx.add_decayed_weights(torch.tensor(0.1)), "weight_decay must be .* not tensor"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_labels():
    assert tx.scale(-0.1).label == "scale(-0.1)"
    assert tx.scale(torch.tensor(1.0)).label == "scale(tensor)"
    assert tx.set_to_zero().label == "set_to_zero()"
    assert tx.scale_by_schedule(math.exp).label == "scale_by_schedule(exp)"
    assert tx.scale_by_learning_rate(1e-5).label == "scale_by_learning_rate(1e-05)"
    assert tx.add_decayed_weights(0.1).label == "add_decayed_weights(0.1)"
    assert tx.add_decayed_weights(0.1, ["w"]).label == "add_decayed_weights(0.1, mask='w')"
