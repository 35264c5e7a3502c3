import pytest
import torch

from fts import transforms as tx
from tests.transforms.trajectories import by_update, make_gradients, make_params

PARAMS, GRADIENTS = make_params(), make_gradients(3)


def by_torch(cls, **options):
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in PARAMS.items()}
    optimizer = cls(parameters.values(), **options)
    for grads in GRADIENTS:
        for name, parameter in parameters.items():
            parameter.grad = grads[name].clone()
        optimizer.step()
    return {name: optimizer.state[parameter] for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("transform", "cls", "options"),
    [
        (tx.adamw(0.1), torch.optim.AdamW, {"lr": 0.1}),
        (tx.chain(tx.scale(1.0), tx.adam(0.1)), torch.optim.Adam, {"lr": 0.1}),
        (tx.skip_nonfinite(tx.sgd(0.1, momentum=0.9)), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (tx.from_torch(torch.optim.Adagrad, lr=0.1), torch.optim.Adagrad, {"lr": 0.1}),
        (tx.reduce_on_plateau(tx.adamw, 0.1, tx.Plateau()), torch.optim.AdamW, {"lr": 0.1}),
    ],
    ids=["adamw", "adam", "sgd", "from_torch", "reduce_on_plateau"],
)
def test_moments_are_those_of_torch(transform, cls, options):
    _, state, _ = by_update(transform, PARAMS, GRADIENTS)
    found, expected = tx.torch_moments(state), by_torch(cls, **options)
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert found[name].keys() == entry.keys()
        for key, value in entry.items():
            torch.testing.assert_close(torch.as_tensor(found[name][key]), torch.as_tensor(value), check_dtype=key != "step")


def test_there_are_none_before_the_first_update_or_without_any():
    for transform in (tx.adamw(0.1), tx.sgd(0.1, momentum=0.9), tx.from_torch(torch.optim.Adagrad, lr=0.1)):
        assert tx.torch_moments(transform.init(PARAMS)) == {}
    for transform in (tx.sgd(0.1), tx.scale(0.1)):
        assert tx.torch_moments(by_update(transform, PARAMS, GRADIENTS)[1]) == {}


def test_groups_come_together():
    both = tx.partition({1: tx.sgd(0.1, momentum=0.9), 2: tx.adam(0.1)}, lambda name, tensor: 1 + (tensor.ndim > 1))
    found = tx.torch_moments(by_update(both, PARAMS, GRADIENTS)[1])
    assert sorted(found) == sorted(PARAMS)
    assert set(found["w"]) == {"step", "exp_avg", "exp_avg_sq"} and set(found["b"]) == {"momentum_buffer"}
