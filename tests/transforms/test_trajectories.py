"""100 steps of sgd, adam and adamw equal those of torch.optim, by `update` and by `apply`."""

import math

import pytest
import torch
from torch import nn

from fts import transforms as tx
from tests.transforms.trajectories import by_apply, by_update, make_gradients, make_params

STEPS = 100
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-13}, torch.float32: {"rtol": 2e-4, "atol": 2e-5}}
MATRICES = ("w", "kernel")


def by_torch(make_optimizer, params, gradients, *, factor=None, max_norm=None, decayed=None):
    """The same loop by hand; with `decayed` (names, fraction), two parameter groups."""
    weights = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    if decayed is None:
        groups = list(weights.values())
    else:
        names, fraction = decayed
        groups = [
            {"params": [p for name, p in weights.items() if name in names], "weight_decay": fraction},
            {"params": [p for name, p in weights.items() if name not in names], "weight_decay": 0.0},
        ]
    optimizer = make_optimizer(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor) if factor else None
    for grads in gradients:
        for name, p in weights.items():
            p.grad = grads[name].clone()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(weights.values(), max_norm)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {name: p.detach() for name, p in weights.items()}


def rise_and_fall(step):
    """Warm-up for 10 steps, then half a cosine wave to step 80, by an independent formula."""
    return step / 10 if step < 10 else max(0.0, 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 10) / 70))))


CASES = {
    "sgd": (tx.sgd(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "sgd momentum": (tx.sgd(0.05, momentum=0.9), lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)),
    "sgd dampening": (
        tx.sgd(0.05, momentum=0.9, dampening=0.3),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.3),
    ),
    "sgd nesterov": (
        tx.sgd(0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    ),
    "sgd decay": (tx.sgd(0.05, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.05, weight_decay=0.1)),
    "sgd everything": (
        tx.sgd(0.05, momentum=0.8, dampening=0.2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, dampening=0.2, weight_decay=0.1),
    ),
    "adam": (tx.adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "adam decay": (
        tx.adam(0.01, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.01, (0.8, 0.95), 1e-6, weight_decay=0.1),
    ),
    "adamw": (tx.adamw(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
    "adamw decay": (
        tx.adamw(0.01, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3),
        lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.95), 1e-6, weight_decay=0.3),
    ),
    "adamw no decay": (tx.adamw(0.01, weight_decay=0.0), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0)),
    # the same optimizers in parts
    "trace": (
        tx.chain(tx.trace(0.9), tx.scale_by_learning_rate(0.05)),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    ),
    "trace nesterov": (
        tx.chain(tx.add_decayed_weights(0.1), tx.trace(0.9, nesterov=True), tx.scale(-0.05)),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "scale_by_adam": (
        tx.chain(tx.scale_by_adam(), tx.add_decayed_weights(0.01), tx.scale_by_learning_rate(0.01)),
        lambda p: torch.optim.AdamW(p, 0.01),
    ),
}


@pytest.mark.parametrize("run", [by_update, by_apply])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_optimizers(case, dtype, run):
    transform, make_optimizer = CASES[case]
    params, gradients = make_params(dtype), make_gradients(STEPS, dtype)
    found, _, _ = run(transform, params, gradients)
    expected = by_torch(make_optimizer, params, gradients)
    for name in params:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE[dtype])


@pytest.mark.parametrize("run", [by_update, by_apply])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_clipping_schedule_and_decay_together(kind, dtype, run):
    schedule = tx.cosine_schedule(0.02, warmup_steps=10, total_steps=80)
    make, make_optimizer = {
        "sgd": (
            lambda lr: tx.sgd(lr, momentum=0.9, weight_decay=0.1),
            lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.1),
        ),
        "adam": (lambda lr: tx.adam(lr, weight_decay=0.1), lambda p: torch.optim.Adam(p, 0.02, weight_decay=0.1)),
        "adamw": (lambda lr: tx.adamw(lr, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1)),
    }[kind]
    params, gradients = make_params(dtype), make_gradients(STEPS, dtype)
    found, _, info = run(tx.chain(tx.clip_by_global_norm(1.0), make(schedule)), params, gradients)
    expected = by_torch(make_optimizer, params, gradients, factor=rise_and_fall, max_norm=1.0)
    for name in params:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE[dtype])
    assert set(info) == {"grad_norm", "lr"}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients[-1].values()))
    torch.testing.assert_close(float(info["grad_norm"]), norm, rtol=1e-5, atol=0.0)
    assert info["lr"].item() == 0.0  # after step 80


@pytest.mark.parametrize("run", [by_update, by_apply])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mask", [lambda name, p: p.ndim > 1, MATRICES, {name: name in MATRICES for name in make_params()}])
def test_masks_are_parameter_groups(mask, dtype, run):
    params, gradients = make_params(dtype), make_gradients(STEPS, dtype)
    expected = by_torch(lambda p: torch.optim.AdamW(p, 0.01), params, gradients, decayed=(MATRICES, 0.3))
    single = tx.adamw(0.01, weight_decay=0.3, mask=mask)
    parts = tx.chain(tx.scale_by_adam(), tx.add_decayed_weights(0.3, mask), tx.scale_by_learning_rate(0.01))
    around = tx.chain(tx.scale_by_adam(), tx.masked(tx.add_decayed_weights(0.3), mask), tx.scale_by_learning_rate(0.01))
    for transform in (single, parts, around):
        found, _, _ = run(transform, params, gradients)
        for name in params:
            torch.testing.assert_close(found[name], expected[name], **TOLERANCE[dtype])


@pytest.mark.parametrize("run", [by_update, by_apply])
def test_partition_is_parameter_groups(run):
    params, gradients = make_params(), make_gradients(STEPS)
    transform = tx.partition(
        {"decay": tx.adamw(0.01, weight_decay=0.3), "no_decay": tx.adamw(0.01, weight_decay=0.0)},
        lambda name, p: "decay" if p.ndim > 1 else "no_decay",
    )
    found, _, info = run(transform, params, gradients)
    expected = by_torch(lambda p: torch.optim.AdamW(p, 0.01), params, gradients, decayed=(MATRICES, 0.3))
    for name in params:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-13)
    assert set(info) == {"lr/decay", "lr/no_decay"}


def test_one_transform_serves_update_and_apply_in_turns():
    transform = tx.adamw(0.01, weight_decay=0.1)
    params, gradients = make_params(), make_gradients(20)
    expected, _, _ = by_update(transform, params, gradients)
    weights, state = {name: p.clone() for name, p in params.items()}, transform.init(params)
    for i, grads in enumerate(gradients):
        if i % 2:
            updates, state, _ = transform.update(grads, state, weights)
            weights = tx.apply_updates(weights, updates)
        else:
            weights, state, _ = transform.apply(grads, state, weights)
    for name in params:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-10, atol=1e-13)
