import math

import pytest
import torch

from fts import transforms as tx
from fts.errors import ArgumentError
from tests.transforms.trajectories import make_gradients, make_params


def test_global_norm():
    tree = {"a": torch.tensor([3.0]), "b": [torch.tensor([[4.0]]), (torch.tensor(12.0),)]}
    assert tx.global_norm(tree).item() == 13.0
    assert tx.global_norm(torch.tensor([3.0, 4.0])).item() == 5.0
    assert tx.global_norm({}).item() == 0.0
    assert tx.global_norm({"w": torch.zeros(0)}).item() == 0.0
    assert tx.global_norm({"w": torch.ones(2, dtype=torch.float64), "b": torch.ones(2)}).dtype == torch.float64


def test_global_norm_of_half_precision_is_float32():
    grads = {"w": torch.full((1_000,), 0.1, dtype=torch.bfloat16)}
    expected = float(grads["w"].double().norm())
    for norm in (tx.global_norm(grads), tx.clip_by_global_norm(9.0).update_(dict(grads), (), None)[2]["grad_norm"]):
        assert norm.dtype == torch.float32
        assert norm.item() == pytest.approx(expected, rel=1e-6)


def test_global_norm_has_a_gradient_at_zero():
    gradient = torch.func.grad(lambda w: tx.global_norm({"w": w, "b": w}))(torch.zeros(3))
    assert torch.equal(gradient, torch.zeros(3))


def test_clip_by_global_norm_keeps_its_promise():
    clip = tx.clip_by_global_norm(1.0)
    updates, _, info = clip.update({"w": torch.tensor([3.0, 4.0])}, clip.init({"w": torch.zeros(2)}), None)
    assert tx.global_norm(updates) <= 1.0
    assert info["grad_norm"].item() == 5.0
    updates, _, _ = clip.update_({"w": torch.tensor([3.0, 4.0])}, (), None)
    assert tx.global_norm(updates) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_by_global_norm_equals_torch(dtype, max_norm):
    grads = make_gradients(7, dtype)[5]
    weights = [torch.nn.Parameter(g.clone()) for g in grads.values()]
    for weight, g in zip(weights, grads.values(), strict=True):
        weight.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm)
    clip = tx.clip_by_global_norm(max_norm)
    for update in (clip.update, clip.update_):
        updates, state, info = update({name: g.clone() for name, g in grads.items()}, (), None)
        assert state == ()
        torch.testing.assert_close(info["grad_norm"], norm, rtol=1e-6, atol=0)
        for found, weight in zip(updates.values(), weights, strict=True):
            torch.testing.assert_close(found, weight.grad, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_passed_on(bad):
    clip = tx.clip_by_global_norm(1.0)
    for update in (clip.update, clip.update_):
        updates, _, info = update({"w": torch.tensor([bad, 1.0])}, (), None)
        assert not info["grad_norm"].isfinite()
        assert updates["w"][0].isnan()


def test_mixed_dtypes():
    grads = {"w": torch.full((4,), 3.0, dtype=torch.bfloat16), "b": torch.full((4,), 4.0, dtype=torch.float64)}
    clip = tx.clip_by_global_norm(1.0)
    for update in (clip.update, clip.update_):
        updates, _, info = update({name: g.clone() for name, g in grads.items()}, (), None)
        assert info["grad_norm"].item() == pytest.approx(10.0)
        assert {name: u.dtype for name, u in updates.items()} == {name: g.dtype for name, g in grads.items()}
        torch.testing.assert_close(updates["b"], torch.full((4,), 0.4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_clip_by_value():
    clip = tx.clip_by_value(0.5)
    for update in (clip.update, clip.update_):
        updates, _, info = update({"w": torch.tensor([-2.0, 0.25, 2.0])}, (), None)
        assert updates["w"].tolist() == [-0.5, 0.25, 0.5]
        assert info == {}


def test_clip_by_block_rms():
    grads = {
        "w": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        "b": torch.tensor([0.1, -0.1]),
        "e": torch.zeros(0),
        "s": torch.tensor(-8.0),
    }
    updates, _, _ = tx.clip_by_block_rms(0.5).update(grads, (), None)
    # the root mean square of w is sqrt(25 / 4) = 2.5, five times the threshold
    torch.testing.assert_close(updates["w"], grads["w"] / 5)
    assert torch.equal(updates["b"], grads["b"])
    assert updates["e"].shape == (0,)
    torch.testing.assert_close(updates["s"], torch.tensor(-0.5))


def test_adaptive_clip():
    params = {
        "w": torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]),  # unit norms 5, 0.5, 0
        "b": torch.tensor([0.6, 0.8]),  # one unit of norm 1
        "kernel": torch.ones(2, 1, 2, 2),  # unit norms 2
    }
    grads = {
        "w": torch.tensor([[0.0, 2.0], [0.0, 0.04], [1.0, 0.0]]),
        "b": torch.tensor([0.0, 0.5]),
        "kernel": torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.05)]),
    }
    updates, _, _ = tx.adaptive_clip(0.1, eps=0.01).update(grads, (), params)
    torch.testing.assert_close(updates["w"], torch.tensor([[0.0, 0.5], [0.0, 0.04], [0.001, 0.0]]))
    torch.testing.assert_close(updates["b"], torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(updates["kernel"], torch.stack([torch.full((1, 2, 2), 0.1), torch.full((1, 2, 2), 0.05)]))


def test_adaptive_clip_needs_the_parameters():
    with pytest.raises(ArgumentError, match="adaptive_clip needs the parameters"):
        tx.adaptive_clip(0.1).update(make_params(), (), None)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, -math.inf, "1", None, True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tx.clip_by_value, "clip_by_value: limit"),
        (tx.clip_by_global_norm, "clip_by_global_norm: max_norm"),
        (tx.clip_by_block_rms, "clip_by_block_rms: threshold"),
        (tx.adaptive_clip, "adaptive_clip: clipping"),
        (lambda bad: tx.adaptive_clip(0.1, eps=bad), "adaptive_clip: eps"),
    ],
)
def test_errors(make, name, bad):
    with pytest.raises(ArgumentError, match=rf"{name} must be a number in \(0, inf\), not {bad!r}"):
        make(bad)


def test_labels():
    assert tx.clip_by_global_norm(1.0).label == "clip_by_global_norm(1.0)"
    assert tx.clip_by_value(2).label == "clip_by_value(2)"
    assert tx.clip_by_block_rms(0.5).label == "clip_by_block_rms(0.5)"
    assert tx.adaptive_clip(0.01).label == "adaptive_clip(0.01)"


def test_an_infinite_norm_only_reports():
    grads = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([math.inf])}
    clip = tx.clip_by_global_norm(math.inf)
    for update in (clip.update, clip.update_):
        updates, _, info = update({name: grad.clone() for name, grad in grads.items()}, (), None)
        assert all(torch.equal(updates[name], grads[name]) for name in grads)
        assert info["grad_norm"] == math.inf
