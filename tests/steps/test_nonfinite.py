"""Checks for losses and gradients that are NaN or infinite."""

import math

import pytest
import torch
from torch import nn

import fts
from fts import steps, transforms as tx
from fts.errors import ArgumentError, NonFiniteError

NAN, INF = float("nan"), float("inf")


def loss(params, batch):
    return (params["w"] * batch).sum() + params["b"].sum()


def first_state(transform):
    return fts.TrainState.create({"w": torch.ones(2), "b": torch.ones(1)}, transform)


def test_counts_by_name():
    tensors = {"a": torch.tensor([NAN, INF, -INF, 1.0]), "b": torch.ones(2), "c": torch.tensor(INF)}
    assert steps.find_nonfinite(tensors) == {"a": (1, 2, 4), "c": (0, 1, 1)}
    assert steps.find_nonfinite({}) == {}
    # the squares overflow, the values do not
    assert steps.find_nonfinite({"w": torch.full((4,), 3e38), "h": torch.full((9,), 6e4, dtype=torch.float16)}) == {}


@pytest.mark.parametrize("donate", [False, True])
def test_the_error_names_step_loss_and_parameters_and_the_state_stays(donate):
    optimizer = tx.adamw(0.1)
    step = steps.with_nonfinite_check(steps.train_step(loss, optimizer, donate=donate))
    plain = steps.train_step(loss, optimizer)
    state, _ = step(first_state(optimizer), torch.ones(2))
    expected, _ = plain(first_state(optimizer), torch.ones(2))
    with pytest.raises(
        NonFiniteError, match=r"In step 2 the loss is nan; the gradients of 1 of 2 .*: w \(1 NaN and 0 inf"
    ) as caught:
        step(state, torch.tensor([NAN, 1.0]))
    assert "b (" not in str(caught.value)
    state, metrics = step(state, torch.ones(2))  # the state is valid, also after an error in a step with donation
    expected, expected_metrics = plain(expected, torch.ones(2))
    for name in expected.params:
        assert torch.equal(state.params[name], expected.params[name])
    assert metrics == expected_metrics and int(state.step) == 2


def test_a_loss_that_is_infinite_with_finite_gradients():
    step = steps.with_nonfinite_check(steps.train_step(lambda params, batch: params["w"].sum() + batch, tx.sgd(0.1)))
    state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    with pytest.raises(NonFiniteError, match="the loss is inf; all gradients are finite"):
        step(state, torch.tensor(INF))


def test_running_statistics_stay_good():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = tx.sgd(0.1)
    step = steps.with_nonfinite_check(
        steps.train_step(steps.module_loss(net, lambda model, batch: model(batch).mean()), optimizer, donate=True)
    )
    state = fts.TrainState.create(net, optimizer)
    before = {name: tensor.clone() for name, tensor in state.buffers.items()}
    with pytest.raises(NonFiniteError, match=r"[456] of 6"):
        step(state, torch.full((4, 3), NAN))
    assert all(torch.equal(state.buffers[name], before[name]) for name in before)


def test_long_lists_are_truncated():
    params = {f"w{i}": torch.ones(1) for i in range(8)}
    step = steps.with_nonfinite_check(steps.train_step(lambda p, batch: sum(t.sum() for t in p.values()) * batch, tx.sgd(0.1)))
    with pytest.raises(NonFiniteError, match=r"8 of 8 .*w4 \(.* and 3 more\."):
        step(fts.TrainState.create(params, tx.sgd(0.1)), torch.tensor(NAN))


def test_all_kinds_of_steps():
    optimizer = tx.sgd(0.1)
    state, bad = first_state(optimizer), torch.tensor([NAN, 1.0])
    passing = steps.with_full_batch(steps.train_step(lambda p, b, scale: loss(p, b) * scale, optimizer), lambda batch: [2.0])
    net = nn.Linear(1, 1)

    def own(model, batch):
        value = model(batch).sum()
        value.backward()
        return value

    backward = steps.gradient_step(steps.manual_backward(net, own), optimizer)
    for step in (passing, steps.train_step(loss, optimizer, engine="func"), steps.train_step(loss, optimizer, accumulate=2)):
        with pytest.raises(NonFiniteError, match="In step 1"):
            steps.with_nonfinite_check(step)(state, bad)
    with pytest.raises(NonFiniteError, match="weight"):
        steps.with_nonfinite_check(backward)(fts.TrainState.create(net, optimizer), torch.tensor([[NAN]]))
    assert "must be finite" in steps.describe(steps.with_nonfinite_check(passing))


def test_steps_that_cannot_be_checked_are_an_error():
    step = steps.train_step(loss, tx.sgd(0.1))
    with pytest.raises(ArgumentError, match="graph"):
        steps.with_nonfinite_check(steps.compile(step))
    with pytest.raises(ArgumentError, match="graph"):
        steps.compile(steps.with_nonfinite_check(step))
    with pytest.raises(ArgumentError, match="function"):
        steps.with_nonfinite_check(lambda state, batch: (state, {}))
    with pytest.raises(ArgumentError, match="gradient function such as"):
        steps.raise_if_nonfinite(loss)
    with pytest.raises(ArgumentError, match="graph"):
        torch.func.vmap(lambda x: steps.with_nonfinite_check(step)(first_state(tx.sgd(0.1)), x)[1]["loss"])(torch.ones(2, 2))


def test_gradients_inside_any_step():
    optimizer = tx.sgd(0.1)
    state, batch = first_state(optimizer), torch.tensor([3.0, 4.0])
    step = steps.train_step(loss, optimizer)
    of_passing = steps.with_full_batch(steps.train_step(lambda p, b, scale: loss(p, b) * scale, optimizer), lambda batch: [1.0])
    for each in (
        step,
        steps.with_nonfinite_check(step),
        of_passing,
        steps.compile(step, backend="eager"),
        steps.SwappableStep(step),
    ):
        value, grads = steps.compute_gradients(each, state, batch)
        assert value.loss == 8.0 and torch.equal(grads["w"], batch)
    value, grads = steps.compute_gradients(
        steps.with_nonfinite_check(step), state, batch * NAN
    )  # to be looked at, so nothing raises
    assert math.isnan(value.loss) and grads["w"].isnan().all()
    with pytest.raises(ArgumentError, match="cannot be reached"):
        steps.compute_gradients(lambda state, batch: (state, {}), state, batch)
