import math

import pytest
import torch

from fts import transforms as tx
from fts.errors import ArgumentError
from tests.transforms.trajectories import by_apply, by_update, copy


def test_trace_by_hand():
    grads = {"w": torch.tensor([1.0])}
    for nesterov, expected in ((False, [1.0, 1.5, 1.75]), (True, [1.5, 1.75, 1.875])):
        transform = tx.trace(0.5, nesterov)
        for update in (transform.update, transform.update_):
            state, found = transform.init(grads), []
            for _ in range(3):
                updates, state, info = update(copy(grads), state, None)
                found.append(updates["w"].item())
            assert found == expected
            assert state.trace["w"].item() == 1.75
            assert info == {}


def test_updates_in_place_do_not_share_memory_with_the_state():
    transform, grads = tx.trace(0.5), {"w": torch.tensor([1.0])}
    updates, state, _ = transform.update_(copy(grads), transform.init(grads), None)
    updates["w"].zero_()
    assert state.trace["w"].item() == 1.0


def test_sgd_without_momentum_keeps_no_buffers():
    params = {"w": torch.ones(2)}
    state = tx.sgd(0.1).init(params)
    assert state.trace == {}
    assert int(state.step) == 0 and state.step.dtype == torch.int64
    _, state, info = by_apply(tx.sgd(0.1), params, [params] * 3)
    assert int(state.step) == 3
    assert info["lr"].item() == 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}]
)
def test_half_precision_moves(dtype, options):
    """torch 2.13's fused SGD leaves bfloat16 and float16 tensors on the CPU as they were."""
    params = {"w": torch.linspace(-1, 1, 100).to(dtype)}
    gradients = [{"w": torch.ones(100, dtype=dtype)}] * 3
    for run in (by_update, by_apply):
        found, _, _ = run(tx.sgd(0.1, **options), params, gradients)
        expected, _, _ = by_update(
            tx.sgd(0.1, **options), {"w": params["w"].double()}, [{"w": g["w"].double()} for g in gradients]
        )
        torch.testing.assert_close(found["w"].double(), expected["w"], rtol=0.02, atol=0.02)


def test_weight_decay_needs_the_parameters():
    transform, grads = tx.sgd(0.1, weight_decay=0.1), {"w": torch.ones(2)}
    with pytest.raises(ArgumentError, match="sgd with weight_decay needs the parameters"):
        transform.update(grads, transform.init(grads), None)
    tx.sgd(0.1).update(grads, tx.sgd(0.1).init(grads), None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tx.trace(1.0), r"trace: decay must be a number in \[0, 1\), not 1.0"),
        (lambda: tx.trace(-0.1), "not -0.1"),
        (lambda: tx.sgd(-1.0), r"sgd: lr must be a number in \[0, inf\), not -1.0"),
        (lambda: tx.sgd(math.nan), "sgd: lr .* not nan"),
        (lambda: tx.sgd(0.1, momentum=1.5), "sgd: momentum .* not 1.5"),
        (lambda: tx.sgd(0.1, momentum=0.9, dampening=-1), "sgd: dampening .* not -1"),
        (lambda: tx.sgd(0.1, weight_decay=-1), "sgd: weight_decay .* not -1"),
        (lambda: tx.sgd(0.1, nesterov=True), "nesterov needs a momentum .* not momentum=0.0, dampening=0.0"),
        (lambda: tx.sgd(0.1, momentum=0.9, dampening=0.1, nesterov=True), "dampening=0.1"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_labels():
    assert tx.trace(0.9).label == "trace(0.9)"
    assert tx.trace(0.9, nesterov=True).label == "trace(0.9, nesterov)"
    assert tx.sgd(0.1).label == "sgd(lr=0.1)"
    full = tx.sgd(0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    assert full.label == "sgd(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov)"
