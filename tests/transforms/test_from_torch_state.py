"""A transform with the state of one of torch's optimizers continues as that does."""

import pytest
import torch
from torch import nn

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.transforms.from_torch_state import with_plateau, with_torch_moments


def parts():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


def grads(net, number):
    net.zero_grad()
    net(torch.full((2, 3), 0.1 * number, dtype=torch.float64)).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


CASES = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2), lambda: tx.adamw(0.1, weight_decay=0.2)),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1), lambda: tx.adam(0.1)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), lambda: tx.sgd(0.1, 0.9, nesterov=True)),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), lambda: tx.sgd(0.1)),
    "from torch": (
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda: tx.from_torch(torch.optim.AdamW, lr=0.1, amsgrad=True),
    ),
    "chained": (lambda p: torch.optim.AdamW(p, lr=0.1), lambda: tx.chain(tx.clip_by_global_norm(1e9), tx.adamw(0.1))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_transform_goes_on_where_a_torch_optimizer_was(name):
    make, transform = CASES[name]
    net, descent = parts(), transform()
    optimizer = make(net.parameters())
    for number in range(1, 4):
        grads(net, number)
        optimizer.step()
    params = {key: value.detach().clone() for key, value in net.named_parameters()}
    new = descent.init(params)
    moments = {key: optimizer.state.get(value, {}) for key, value in net.named_parameters()}
    state = with_torch_moments(new, moments, step=3, groups=optimizer.state_dict()["param_groups"])
    kept = tx.torch_moments(state)
    assert kept.keys() == {key for key, entry in moments.items() if entry}
    for key, entry in kept.items():
        assert all(torch.equal(torch.as_tensor(value), moments[key][part]) for part, value in entry.items())
    for number in range(4, 7):
        gradients = grads(net, number)
        optimizer.step()
        updates, state, _ = descent.update(gradients, state, params)
        params = tx.apply_updates(params, updates)
    for key, value in net.named_parameters():
        torch.testing.assert_close(params[key], value.detach(), rtol=1e-12, atol=1e-12)


def test_a_parameter_that_never_had_a_gradient_has_zero_moments():
    params = {"w": torch.ones(2), "idle": torch.ones(3)}
    entry = {"step": torch.tensor(2.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    state = with_torch_moments(tx.adamw(0.1).init(params), {"w": entry}, step=5)
    assert int(state.step) == 2
    assert torch.equal(state.mu["idle"], torch.zeros(3))


MOMENTS = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}


@pytest.mark.parametrize(
    ("descent", "entry", "words"),
    [
        (tx.sgd(0.1, 0.9), MOMENTS, "exp_avg"),
        (tx.adamw(0.1), {"momentum_buffer": torch.ones(2)}, "momentum_buffer"),
        (tx.adamw(0.1), MOMENTS | {"max_exp_avg_sq": torch.ones(2)}, "max_exp_avg_sq"),
        (tx.adamw(0.1), MOMENTS | {"exp_avg": torch.ones(3)}, r"\[3\]; it must be \[2\]"),
        (tx.adamw(0.1), MOMENTS | {"exp_avg": "text"}, "a str"),
        (tx.scale(0.1), MOMENTS, "neither adam"),
        (tx.from_torch(torch.optim.RMSprop, lr=0.1), MOMENTS, "square_avg"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(descent, entry, words):
    with pytest.raises(ArgumentError, match=words):
        with_torch_moments(descent.init({"w": torch.zeros(2)}), {"w": entry}, step=1, groups=[{}])


def test_another_rule_is_refused():
    state = tx.reduce_on_plateau(tx.sgd, 0.1, tx.Greedy()).init({"w": torch.zeros(1)})
    with pytest.raises(ArgumentError, match="the rule remembers"):
        with_plateau(state, 0.1, {"best": 1.0, "num_bad_epochs": 0, "cooldown_counter": 0})
