"""Transforms from rules: what a rule gets, what kernels it becomes, and what is refused."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fts import transforms as tx
from fts.errors import ArgumentError, ScheduleError
from fts.typing import Params
from tests.transforms.example_rules import contributing, orthogonalize, schedule_free_sgd
from tests.transforms.trajectories import assert_close, by_apply, by_update, copy, make_gradients, make_params


class PairState(NamedTuple):
    first: Params
    second: Params


class CountState(NamedTuple):
    step: Tensor


def kernels(transform, params=None):
    """The lines of the plan, after one update in place."""
    params = make_params() if params is None else params
    transform.update_(make_gradients(1)[0], transform.init(params), params)
    return transform.update_.__self__.plan.source.splitlines()[1:]


def both(transform, count=4):
    """The results of `update`, and those of `update_` on copies, after some updates."""
    params, gradients = make_params(), make_gradients(count)
    state, fast = transform.init(params), transform.init(params)
    for grads in gradients:
        updates, state, info = transform.update(grads, state, params)
        found = transform.update_(copy(grads), fast, params)
        fast = found[1]
    return (updates, state, info), found


def test_lion_is_that_of_its_paper():
    """Algorithm 2 of Chen et al. 2023, in Python numbers."""
    lion = contributing()["lion"](0.1, b1=0.5, b2=0.75, weight_decay=0.25)
    for run in (by_update, by_apply):
        weight, m, slopes = 2.0, 0.0, [1.0, -3.0, 0.5]
        for g in slopes:
            c, m = 0.5 * m + 0.5 * g, 0.75 * m + 0.25 * g
            weight -= 0.1 * ((c > 0) - (c < 0) + 0.25 * weight)
        transform = lion if lion.apply else tx.chain(lion)
        params, _, info = run(
            transform,
            {"w": torch.tensor([2.0], dtype=torch.float64)},
            [{"w": torch.tensor([g], dtype=torch.float64)} for g in slopes],
        )
        assert params["w"].item() == pytest.approx(weight, rel=1e-12)
        assert info["lr"].item() == 0.1
    assert lion.label == "lion(lr=0.1, weight_decay=0.25)"


def test_lion_runs_on_lists():
    lines = kernels(contributing()["scale_by_lion"]())
    assert len(lines) == 6  # two scalings, two additions with alpha, a sign, and the return
    assert sum("list(" in line for line in lines) == 1


def test_adam_allocates_one_list():
    lines = kernels(tx.scale_by_adam())
    assert lines[-1].strip() == "return grad"
    assert sum("list(" in line for line in lines) == 1
    assert "addcmul" in lines[2]


def test_new_values_are_written_over_the_old():
    transform, params = tx.scale_by_adam(), make_params()
    state = transform.init(params)
    memory = {name: mu.data_ptr() for name, mu in state.mu.items()}
    _, after, _ = transform.update_(make_gradients(1)[0], state, params)
    assert {name: mu.data_ptr() for name, mu in after.mu.items()} == memory


RULES = {
    "fields change places": lambda grad, first, second: (grad + first, second, first),
    "fields shift": lambda grad, first, second: (grad - second, grad, first),
    "an old value after the new one": lambda grad, first, second: (0.5 * first + grad, 0.25 * first + grad, second),
    "the update is the state": lambda grad, first, second: (grad + 0.5 * first, grad + 0.5 * first, first),
    "the update is a field": lambda grad, first, second: (first, grad, second + grad),
    "both fields are the gradient": lambda grad, first, second: (grad, grad, grad),
    "the parameter": lambda grad, param, first, second: (param, param, second + param),
    "a decay of the parameter": lambda grad, param, first, second: (grad - 0.1 * param, param - grad, second),
    "products": lambda grad, first, second: (
        grad * grad + 0.5 * grad * first - first * second / 2,
        first + grad / (second + 1),
        second - 0.25 * grad / (grad * grad + 1),
    ),
    "numbers on the left": lambda grad, first, second: (1 - grad, 2 * first + 1, 1 / (second * second + 2)),
    "functions": lambda grad, first, second: (
        grad.tanh().clamp(-0.5, 0.5),
        torch.maximum(first, grad.abs()),
        torch.where(grad > 0, second + 1, second.square().sqrt()),
    ),
    "methods with options": lambda grad, first, second: (
        torch.add(grad, first, alpha=2),
        first.lerp(grad, 0.25).clamp(min=-1),
        torch.addcmul(second, grad, grad, value=0.5) ** 3,
    ),
    "comparisons as numbers": lambda grad, first, second: (grad * (grad * first > 0), grad, second + (grad > 0) * 2.0),
}


@pytest.mark.parametrize("name", RULES)
def test_lists_equal_tensors(name):
    pure, fast = both(tx.elementwise(RULES[name], PairState, label=name))
    assert_close(fast, pure)
    tensors = [*fast[0].values(), *fast[1].first.values(), *fast[1].second.values()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize(
    "rule",
    [
        lambda grad, step: grad * (1 - 0.5**step) / (1 + step),
        lambda grad, step: torch.where(step > 2, grad, -grad),
        lambda grad, step: grad * ((step - 3) / step) ** 0.5,  # a complex number for Python, NaN for torch
        lambda grad, step: grad / (step - 1),  # infinite in the first update
        lambda grad, step: grad * step.sqrt() * torch.clamp(step, max=2),
    ],
)
def test_numbers_are_those_of_tensors(rule):
    for count in (1, 4):
        pure, fast = both(tx.elementwise(rule, CountState, label="rule"), count)
        assert_close(fast, pure)


def test_numbers_keep_the_dtype_of_0d_tensors():
    transform = tx.elementwise(lambda grad, step: grad / step, CountState, label="rule")
    grads = {"s": torch.tensor(3.0)}
    assert transform.update(grads, transform.init(grads), None)[0]["s"].dtype == torch.float32


def test_shared_numbers():
    transform, params = schedule_free_sgd(0.5), make_params()
    pure, fast = both(transform)
    assert_close(fast, pure)
    assert pure[1].weight_sum.item() == 1.0
    assert pure[2]["lr"].item() == 0.5
    assert all(torch.equal(z, params[name]) for name, z in transform.init(params).z.items())


class ScaleState(NamedTuple):
    step: Tensor
    size: Tensor
    idle: Tensor
    mu: Params


def test_shared_numbers_of_the_old_state_are_read_before_it_is_written():
    transform = tx.elementwise(
        lambda grad, mu, size, before, idle: (grad * before / size + idle, mu + size * grad),
        ScaleState,
        init={"size": 1.0, "idle": 3.0},
        shared=lambda grads, state, params: {"size": state.size * 2 + state.step, "before": state.size},
        report=("before", "idle"),
        label="rule",
    )
    pure, fast = both(transform)
    assert_close(fast, pure)
    assert (pure[2]["before"].item(), pure[2]["idle"].item()) == (12.0, 3.0)
    params = make_params()
    state = transform.init(params)
    _, state, info = transform.update_(make_gradients(1)[0], state, params)
    transform.update_(make_gradients(1)[0], state, params)
    assert (info["before"].item(), info["idle"].item()) == (1.0, 3.0)
    on_meta = {name: p.to("meta") for name, p in params.items()}
    state = transform.init(on_meta)
    _, _, info = transform.update_({name: torch.empty_like(p) for name, p in on_meta.items()}, state, on_meta)
    assert {value.device.type for value in info.values()} == {"meta"}


def test_rules_on_full_tensors():
    updates, _, _ = orthogonalize(10).update({"w": torch.eye(3) * 5, "b": torch.ones(2)}, (), None)
    assert torch.linalg.matrix_norm(updates["w"] - torch.eye(3), 2) < 0.4
    assert updates["b"].tolist() == [1.0, 1.0]


def test_an_optimizer_counts_for_a_scaling_that_does_not():
    signs = tx.elementwise(lambda grad: grad.sign(), label="sign()")
    transform, params = tx.optimizer("signsgd", signs, tx.linear_schedule(1.0, 0.0, 4)), make_params()
    for run in (by_update, lambda *args: by_apply(tx.chain(args[0]), *args[1:])):
        _, state, info = run(transform, params, make_gradients(3))
        state = state if isinstance(state, tx.OptimizerState) else state[0]
        assert int(state.step) == 3
        assert info["lr"].item() == 0.5


def test_an_optimizer_checks_its_schedule():
    signs = tx.elementwise(lambda grad: grad.sign(), label="sign()")
    transform, params = tx.optimizer("signsgd", signs, lambda step: -1.0), make_params()
    with pytest.raises(ScheduleError, match=r"returned -1.0 at step 0"):
        transform.update_(make_gradients(1)[0], transform.init(params), params)


def test_a_fused_kernel_makes_the_update():
    calls = []

    def run(params, grads, *, lr, weight_decay, step):
        calls.append((lr, weight_decay, int(step)))
        torch._foreach_add_(params, grads, alpha=-lr)

    plain = tx.elementwise(lambda grad: grad, CountState, label="plain()")
    transform = tx.optimizer("plain", plain, 0.5, fused=tx.FusedKernel(run))
    found, state, _ = by_apply(transform, make_params(), make_gradients(2))
    expected, _, _ = by_update(transform, make_params(), make_gradients(2))
    assert_close(found, expected)
    assert calls == [(0.5, 0.0, 1), (0.5, 0.0, 2)]
    assert int(state.step) == 2


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda grad: grad / grad.norm(), "the rule uses norm, which does not treat every number"),
        (lambda grad: grad @ grad, "the rule uses matmul"),
        (lambda grad: grad.reshape(-1), "the rule uses reshape"),
        (lambda grad: grad if grad > 0 else -grad, "the rule cannot be traced"),
        (lambda grad: 0.0, "returns something that is no tensor"),
    ],
)
def test_rules_that_are_not_elementwise(rule, words):
    transform, grads = tx.elementwise(rule, label="mine"), {"w": torch.ones(2, 2)}
    with pytest.raises(ArgumentError, match=f"mine: {words}|{words}"):
        transform.update_(grads, (), None)


@pytest.mark.parametrize("make", [tx.elementwise, tx.per_tensor])
def test_errors(make):
    with pytest.raises(ArgumentError, match=r"mine: the rule has an argument 'speed'\. It may have grad, param, first, second"):
        make(lambda grad, speed: grad, PairState, label="mine")
    with pytest.raises(ArgumentError, match="mine: a rule is a plain Python function"):
        make(torch.sign, label="mine")
    transform, grads = make(lambda grad, first: (grad, first), PairState, label="mine"), make_gradients(1)[0]
    with pytest.raises(ArgumentError, match=r"mine: the rule must return \(update, first, second\)"):
        transform.update(grads, transform.init(grads), None)
    with pytest.raises(ArgumentError, match="mine needs the parameters"):
        make(lambda grad, param: grad, label="mine(1)").update(grads, (), None)
