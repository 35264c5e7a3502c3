"""Derivatives and vmap through complete steps, with either engine."""

import itertools

import pytest
import torch
from torch import nn

import fts
from fts import steps, transforms as tx
from fts.errors import UnknownParameterError

X = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)


def task(kind: str, engine: str):
    """A step, and a loss of the parameters after it."""
    net = nn.Linear(2, 1, bias=False).double()
    net.weight.data = torch.tensor([[0.5, -0.25]], dtype=torch.float64)

    def of_module(model, batch):
        return model(batch).tanh().square().mean()

    def of_params(params, batch):
        return (batch @ params["weight"].T).tanh().square().mean()

    loss = steps.module_loss(net, of_module) if kind == "module loss" else of_params
    step = steps.train_step(loss, tx.chain(tx.trace(0.9), tx.scale_by_learning_rate(0.1)), engine=engine)
    state = fts.TrainState.create(net, step.transform)

    def after_two_steps(params):
        moved = state.replace(params=params)
        for _ in range(2):
            moved, _ = step(moved, X)
        return of_params(moved.params, X.flip(1))

    return after_two_steps, state.params


def numeric(fn, weight, eps=1e-6):
    grad = torch.zeros_like(weight)
    for index in itertools.product(*map(range, weight.shape)):
        for sign in (1, -1):
            moved = weight.clone()
            moved[index] += sign * eps
            grad[index] += sign * fn({"weight": moved}) / (2 * eps)
    return grad


@pytest.mark.parametrize("kind", ["module loss", "plain function"])
@pytest.mark.parametrize("engine", ["module", "func"])
def test_a_gradient_through_steps_is_exact(kind, engine):
    fn, params = task(kind, engine)
    expected = numeric(fn, params["weight"])
    torch.testing.assert_close(torch.func.grad(fn)(params)["weight"], expected, rtol=1e-6, atol=1e-9)
    leaf = params["weight"].clone().requires_grad_()
    fn({"weight": leaf}).backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["module loss", "plain function"])
@pytest.mark.parametrize("engine", ["module", "func"])
def test_steps_can_be_vmapped(kind, engine):
    fn, params = task(kind, engine)
    stacked = {"weight": torch.stack([params["weight"], 2 * params["weight"]])}
    both = torch.func.vmap(fn)(stacked)
    torch.testing.assert_close(both, torch.stack([fn(params), fn({"weight": 2 * params["weight"]})]))


def test_per_sample_gradients_come_with_their_values():
    grad_fn = steps.value_and_grad(lambda params, x: (params["w"] * x).sum())
    state = fts.TrainState.create({"w": torch.ones(2)}, tx.identity())
    value, grads = torch.func.vmap(grad_fn, in_dims=(None, 0))(state, torch.arange(6.0).reshape(3, 2))
    assert torch.equal(grads["w"], torch.arange(6.0).reshape(3, 2)) and value.loss.shape == (3,)


def test_gradients_for_other_names_are_refused():
    state = fts.TrainState.create({"w": torch.ones(2), "b": torch.ones(1)}, tx.sgd(0.1))
    with pytest.raises(UnknownParameterError, match=r"missing \['b'\], unexpected \['c'\]"):
        steps.apply_gradients(state, {"w": torch.ones(2), "c": torch.ones(1)}, tx.sgd(0.1))


def test_a_stack_of_states_can_be_printed():
    import optree

    state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    assert "step=[2]" in repr(optree.tree_map(lambda leaf: torch.stack([leaf, leaf]), state))
