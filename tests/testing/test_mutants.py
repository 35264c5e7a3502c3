"""Mutation tests of `fts.testing`: each law catches a transform or a step that breaks it."""

import subprocess
import sys

import attrs
import pytest
import torch
from torch import nn

import fts.testing
from fts import steps, transforms as tx
from fts.errors import ArgumentError
from fts.testing import LawError, strategies

ORDINARY = strategies.fixed_trajectory(torch.float64)


def sign(grads, state, params):
    return {name: -g.sign() for name, g in grads.items()}, state, {}


def zeros(params):
    return {name: torch.zeros_like(p) for name, p in params.items()}


def momentum(grads, state, params):
    sums = {name: 0.9 * state[name] + g for name, g in grads.items()}
    return {name: -0.1 * s for name, s in sums.items()}, sums, {"size": fts.global_norm(sums)}


def good_apply(grads, state, params):
    updates, state, info = momentum(grads, state, params)
    return {name: p.add_(updates[name]) for name, p in params.items()}, state, info


def transform(update=momentum, init=zeros, **fast) -> fts.Transform:
    return fts.Transform(init, update, label="mutant", **fast)


MUTANTS: dict[str, list] = {}


def breaks(law: str):
    """Register the transform that a function returns as one that breaks a law."""

    def register(make):
        MUTANTS.setdefault(law, []).append(make)
        return make

    return register


@breaks("same_inputs_same_outputs")
def draws_from_the_ambient_generator():
    return transform(lambda g, s, p: ({k: v + torch.randn_like(v) for k, v in g.items()}, s, {}), lambda p: ())


@breaks("same_inputs_same_outputs")
def counts_in_python():
    calls = []

    def update(grads, state, params):
        calls.append(1)
        return {k: v * len(calls) for k, v in grads.items()}, state, {}

    return transform(update, lambda p: ())


@breaks("same_inputs_same_outputs")
def starts_at_random():
    return transform(init=lambda p: {k: torch.randn_like(v) for k, v in p.items()})


@breaks("inputs_unchanged")
def writes_gradients():
    return transform(lambda g, s, p: ({k: v.mul_(0.5) for k, v in g.items()}, s, {}), lambda p: ())


@breaks("inputs_unchanged")
def writes_its_state():
    return transform(lambda g, s, p: ({k: s[k].add_(v).clone() for k, v in g.items()}, s, {}))


@breaks("inputs_unchanged")
def writes_parameters():
    def update(grads, state, params):
        for name, g in grads.items():
            params[name].sub_(g)
        return zeros(grads), state, {}

    return transform(update)


@breaks("inputs_unchanged")
def init_writes_parameters():
    return transform(init=lambda p: {k: v.mul_(1.5).clone() for k, v in p.items()})


@breaks("state_owns_its_memory")
def keeps_the_parameters_themselves():
    return transform(init=dict)


@breaks("state_owns_its_memory")
def has_one_tensor_twice():
    def init(params):
        start = zeros(params)
        return (start, dict(start))

    return transform(lambda g, s, p: (g, s, {}), init)


@breaks("state_owns_its_memory")
def apply_keeps_gradients():
    def apply(grads, state, params):
        return {k: p.sub_(state[k]) for k, p in params.items()}, grads, {}

    return transform(lambda g, s, p: ({k: -v for k, v in s.items()}, g, {}), apply=apply)


@breaks("state_owns_its_memory")
def update_in_place_returns_its_state():
    def update_(grads, state, params):
        for name, g in grads.items():
            state[name].mul_(0.9).add_(g)
        return state, state, {}

    return transform(lambda g, s, p: ((sums := {k: 0.9 * s[k] + v for k, v in g.items()}), sums, {}), update_=update_)


@breaks("apply_equals_update")
def apply_has_another_rate():
    return transform(apply=lambda g, s, p: good_apply({k: v * 1.001 for k, v in g.items()}, s, p))


@breaks("apply_equals_update")
def apply_forgets_the_state():
    return transform(apply=lambda g, s, p: (good_apply(g, s, p)[0], s, good_apply(g, s, p)[2]))


@breaks("apply_equals_update")
def apply_reports_nothing():
    return transform(apply=lambda g, s, p: (*good_apply(g, s, p)[:2], {}))


@breaks("apply_equals_update")
def apply_widens():
    return transform(apply=lambda g, s, p: ({k: v.float() for k, v in good_apply(g, s, p)[0].items()}, *good_apply(g, s, p)[1:]))


@breaks("apply_equals_update")
def apply_trusts_a_kernel_that_skips_vectors_of_bfloat16():
    """Like torch 2.13's fused SGD: only long tensors of one dtype are wrong."""

    def apply(grads, state, params):
        for name, p in params.items():
            if p.dtype != torch.bfloat16 or p.numel() < 16:
                p.sub_(grads[name], alpha=0.1)
        return params, state, {}

    return transform(lambda g, s, p: ({k: -0.1 * v for k, v in g.items()}, s, {}), lambda p: (), apply=apply)


@breaks("apply_equals_update")
def apply_needs_its_gradients_later():
    """Right in one update, wrong in two: the state is the caller's gradient, which is overwritten."""
    return transform(
        lambda g, s, p: ({k: -v for k, v in s.items()}, {k: v.clone() for k, v in g.items()}, {}),
        apply=lambda g, s, p: ({k: v.sub_(s[k]) for k, v in p.items()}, g, {}),
    )


@breaks("update_in_place_equals_update")
def update_in_place_differs():
    return transform(update_=lambda g, s, p: ({k: -0.1 * v for k, v in g.items()}, *momentum(g, s, p)[1:]))


@breaks("update_in_place_equals_update")
def update_in_place_writes_parameters():
    def update_(grads, state, params):
        result = momentum(grads, state, params)
        for p in params.values():
            p.zero_()
        return result

    return transform(update_=update_)


@breaks("state_is_tensors")
def counts_with_a_number():
    return transform(lambda g, s, p: (g, s + 1, {}), lambda p: 0)


@breaks("state_is_tensors")
def holds_nothing():
    return transform(sign, lambda p: {"momentum": None})


@breaks("state_is_tensors")
def keeps_a_graph():
    return transform(sign, lambda p: {k: v.clone().requires_grad_() for k, v in p.items()})


@breaks("structure_is_stable")
def grows():
    return transform(lambda g, s, p: (g, (*s, torch.zeros(())), {}), lambda p: ())


@breaks("structure_is_stable")
def turns_its_counter_into_a_float():
    return transform(lambda g, s, p: (g, s * 0.5, {}), lambda p: torch.zeros((), dtype=torch.int64))


@breaks("structure_is_stable")
def forgets_a_parameter():
    return transform(lambda g, s, p: (dict(list(g.items())[1:]), s, {}), lambda p: ())


@breaks("structure_is_stable")
def widens_updates():
    return transform(lambda g, s, p: ({k: v.double() if v.ndim else v.float() for k, v in g.items()}, s, {}), lambda p: ())


@breaks("structure_is_stable")
def reports_now_and_then():
    def update(grads, state, params):
        return grads, state + 1, {"first": state} if int(state) == 0 else {}

    return transform(update, lambda p: torch.zeros((), dtype=torch.int64))


@breaks("info_is_flat")
def reports_a_number():
    return transform(lambda g, s, p: (g, s, {"lr": 0.1}), lambda p: ())


@breaks("info_is_flat")
def reports_a_vector():
    return transform(lambda g, s, p: (g, s, {"norms": torch.zeros(2)}), lambda p: ())


@breaks("info_is_flat")
def reports_a_tree():
    return transform(lambda g, s, p: (g, s, {"norms": dict(g)}), lambda p: ())


@breaks("state_round_trips")
def writes_two_paths_alike():
    return transform(sign, lambda p: {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)})


@breaks("state_round_trips")
def holds_strings():
    return transform(sign, lambda p: {"name": "sign"})


@breaks("traced_equals_eager")
def reads_a_number():
    def update(grads, state, params):
        size = sum(float(g.abs().sum().item()) for g in grads.values())
        return {k: v / (1 + size) if size > 1 else v for k, v in grads.items()}, state, {}

    return transform(update, lambda p: ())


@breaks("traced_equals_eager")
def means_something_else_in_a_graph():
    return transform(
        lambda g, s, p: ({k: v * (2 if torch.compiler.is_compiling() else 1) for k, v in g.items()}, s, {}), lambda p: ()
    )


@breaks("traced_once")
def counts_with_a_number_in_the_graph():
    return transform(lambda g, s, p: ({k: v * (1 + s) for k, v in g.items()}, s + 1, {}), lambda p: 0)


@breaks("vmapped_equals_loop")
def decides_by_a_value():
    return transform(lambda g, s, p: ({k: v if (v.sum() > 0) else -v for k, v in g.items()}, s, {}), lambda p: ())


@breaks("vmapped_equals_loop")
def mixes_the_population():
    """Flattens what it does not know to be one member of many: fails under vmap, where writes in place escape."""

    def update(grads, state, params):
        total = torch.zeros(())
        for g in grads.values():
            total += g.sum().float()
        return {k: v * total.to(v.dtype) for k, v in grads.items()}, state, {}

    return transform(update, lambda p: ())


@breaks("differentiable")
def cuts_the_graph():
    return transform(lambda g, s, p: ({k: v * v.detach() for k, v in g.items()}, s, {}), lambda p: ())


@breaks("differentiable")
def hides_a_nan_behind_where():
    return transform(
        lambda g, s, p: ({k: torch.where(v.abs() > 0, v, (v - v).sqrt()) for k, v in g.items()}, s, {}), lambda p: ()
    )


@breaks("chaining_is_associative")
def depends_on_who_calls():
    """Its state depends on the number of calls of `init`, as in a chain that initializes twice."""
    calls = []

    def init(params):
        calls.append(1)
        return torch.tensor(len(calls))

    return transform(sign, init)


PAIRS = [(law, make) for law, mutants in MUTANTS.items() for make in mutants]


@pytest.mark.parametrize(("law", "make"), PAIRS, ids=[f"{law}-{make.__name__}" for law, make in PAIRS])
def test_a_mutant_is_caught(law, make):
    with pytest.raises(LawError, match=rf"mutant.* breaks the law {law.replace('chaining_is', '.*_is')}"):
        fts.testing.check_transform(make(), laws=[law])


def test_every_law_has_a_mutant():
    assert MUTANTS.keys() == fts.testing.TRANSFORM_LAWS.keys()


def test_a_sound_transform_passes_every_law():
    def apply_in_place(grads, state, params):
        return good_apply(grads, state, params)

    fts.testing.check_transform(transform(apply=apply_in_place))


def test_a_transform_of_a_user_in_one_line():
    fts.testing.check_transform(fts.Transform(lambda params: (), sign))


def test_the_message_names_the_law_the_transform_the_parameter_and_both_values():
    half = fts.Transform(lambda p: (), lambda g, s, p: ({k: v.mul_(0.5) for k, v in g.items()}, s, {}), label="half")
    params = {"w": torch.tensor([1.0])}
    with pytest.raises(LawError) as caught:
        fts.testing.TRANSFORM_LAWS["inputs_unchanged"](half, params, [{"w": torch.tensor([3.0])}])
    assert str(caught.value) == (
        "half breaks the law inputs_unchanged: after update, grads['w'] is tensor([1.5000]), expected tensor([3.])"
    )
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, fts.errors.FtsError)


def test_an_exception_inside_keeps_its_cause():
    def update(grads, state, params):
        raise KeyError("mu")

    with pytest.raises(LawError, match="raised KeyError: 'mu'") as caught:
        fts.testing.TRANSFORM_LAWS["info_is_flat"](transform(update), *ORDINARY)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_chain_that_nests_states_is_not_associative():
    def nesting(first, second, third=None, fourth=None):
        rest = [t for t in (second, third, fourth) if t is not None]
        second = rest[0] if len(rest) == 1 else nesting(*rest)

        def update(grads, state, params):
            grads, one, _ = first.update(grads, state[0], params)
            grads, two, _ = second.update(grads, state[1], params)
            return grads, (one, two), {}

        return fts.Transform(lambda params: (first.init(params), second.init(params)), update)

    with pytest.raises(LawError, match="structure"):
        fts.testing.chain_is_associative(tx.trace(0.9), tx.scale(2.0), tx.trace(0.5), *ORDINARY, chain=nesting)


def test_wrong_arguments_are_explained():
    with pytest.raises(ArgumentError, match="Did you forget to call"):
        fts.testing.check_transform(tx.sgd)
    with pytest.raises(ArgumentError, match="no law 'purity'"):
        fts.testing.check_transform(tx.sgd(0.1), laws=["purity"])
    with pytest.raises(ArgumentError, match="at least one batch"):
        fts.testing.check_step(lambda state, batch: (state, {}), None, [])
    with pytest.raises(ArgumentError, match="needs a step"):
        fts.testing.check_step(None, None, [])


def test_without_hypothesis_the_remedy_is_named():
    code = """
import sys
sys.modules["hypothesis"] = None
import fts
try:
    fts.testing
except fts.errors.MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'fts-torch[dev]'" in done.stdout


# Steps


def squares(params, batch):
    return (params["w"] * batch).square().mean()


def state_of(optimizer=None) -> fts.TrainState:
    return fts.TrainState.create(
        {"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}, optimizer or tx.sgd(0.1, momentum=0.9)
    )


BATCHES = [torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3), -torch.ones(3, 3, dtype=torch.float64)]
GOOD = steps.train_step(squares, tx.sgd(0.1, momentum=0.9))


@attrs.frozen
class Wrapped:
    """A flawed wrapper of a correct step."""

    flaw: object
    donate: bool = False

    def __call__(self, state, batch):
        return self.flaw(self, state, batch)


def flawed(flaw):
    return Wrapped(flaw)


def ambient(self, state, batch):
    return GOOD(state, batch + torch.rand(()).double())


def writes_state(self, state, batch):
    after = GOOD(state, batch)
    state.params["w"].zero_()
    return after


def writes_batch(self, state, batch):
    after = GOOD(state, batch)
    batch.mul_(2)
    return after


def number(self, state, batch):
    return GOOD(state, batch)[0], {"loss": 1.0}


def holds_graph(self, state, batch):
    leaf = state.params["w"].clone().requires_grad_()
    return GOOD(state, batch)[0], {"loss": squares({"w": leaf}, batch)}


def stands_still(self, state, batch):
    after, metrics = GOOD(state, batch)
    return after.replace(step=state.step), metrics


def narrows(self, state, batch):
    after, metrics = GOOD(state, batch)
    return after.replace(params={"w": after.params["w"].float()}), metrics


def donates_otherwise(self, state, batch):
    after = GOOD(state, batch * (2 if self.donate else 1))
    if self.donate:
        fts.state.mark_donated(state, "flawed")
    return after


def forgets_to_consume(self, state, batch):
    return GOOD(state, batch)


def by_identity():
    """Keeps a value between steps that no checkpoint has."""
    seen = {}

    def flaw(self, state, batch):
        key = state.params["w"].data_ptr()
        fresh = key not in seen
        after = GOOD(state, batch * (2 if fresh else 1))
        seen[after[0].params["w"].data_ptr()] = after[0]
        return after

    return flawed(flaw)


def in_func(params, batch):
    factor = 2 if torch._C._functorch.peek_interpreter_stack() is not None else 1
    return squares(params, batch) * factor


def in_graph(params, batch):
    return squares(params, batch) * (2 if torch.compiler.is_compiling() else 1)


def breaks_graph(params, batch):
    return squares(params, batch) if float(batch.sum()) > 0 else -squares(params, batch)


def total(params, batch):
    return (params["w"] * batch).square().sum()


def slipping():
    """A forward pass that changes a training flag of its module permanently."""
    net = nn.Sequential(nn.Linear(3, 1, bias=False)).double()

    def fn(model, batch):
        return model[0].eval()(batch).square().mean()

    return steps.train_step(steps.module_loss(net, fn), tx.sgd(0.1)), fts.TrainState.create(net, tx.sgd(0.1))


class Drifting(nn.Module):
    """A non-persistent buffer that training changes and needs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x):
        self.calls += 1
        return (x * self.weight * self.calls).square().mean()


def drifting():
    net = Drifting()
    return steps.train_step(steps.module_loss(net, lambda model, x: model(x)), tx.sgd(0.01)), fts.TrainState.create(
        net, tx.sgd(0.01)
    )


def recompiling():
    """A schedule of Python numbers: each step compiles another graph."""
    taken = [0]

    def step(state, batch):
        taken[0] += 1
        params = {"w": state.params["w"] - 0.1 * taken[0] * batch.mean()}
        return state.replace(params=params, step=state.step + 1), {"loss": batch.mean()}

    return step


STEP_MUTANTS = [
    ("metrics_are_flat", lambda: flawed(number)),
    ("metrics_are_flat", lambda: flawed(holds_graph)),
    ("state_advances", lambda: flawed(stands_still)),
    ("state_advances", lambda: flawed(narrows)),
    ("step_inputs_unchanged", lambda: flawed(writes_state)),
    ("step_inputs_unchanged", lambda: flawed(writes_batch)),
    ("module_unchanged", slipping),
    ("replayed_equals_first", lambda: flawed(ambient)),
    ("donated_equals_pure", lambda: flawed(donates_otherwise)),
    ("donated_equals_pure", lambda: flawed(forgets_to_consume)),
    ("engines_agree", lambda: steps.train_step(in_func, tx.sgd(0.1, momentum=0.9))),
    ("accumulated_equals_big_batch", lambda: steps.train_step(total, tx.sgd(1e-3, momentum=0.9))),
    ("resumed_equals_uninterrupted", by_identity),
    ("resumed_equals_uninterrupted", drifting),
    ("compiled_equals_eager", lambda: steps.train_step(in_graph, tx.sgd(0.1, momentum=0.9))),
    ("compiled_equals_eager", lambda: steps.train_step(breaks_graph, tx.sgd(0.1, momentum=0.9))),
    ("compiled_replays", recompiling),
]


@pytest.mark.parametrize(("law", "make"), STEP_MUTANTS, ids=[f"{law}-{i}" for i, (law, _) in enumerate(STEP_MUTANTS)])
def test_a_flawed_step_is_caught(law, make):
    made = make()
    step, state = made if isinstance(made, tuple) else (made, state_of())
    with pytest.raises(LawError, match=f"breaks the law {law}"):
        fts.testing.check_step(step, state, [batch.clone() for batch in BATCHES], laws=[law])


def test_every_law_of_steps_has_a_mutant():
    assert {law for law, _ in STEP_MUTANTS} == set(fts.testing.STEP_LAWS)


def test_a_sound_step_passes_and_its_state_stays_usable():
    state = state_of()
    fts.testing.check_step(GOOD, state, BATCHES, skip=["compiled_equals_eager", "compiled_replays"])
    assert int(state.step) == 0 and torch.equal(state.params["w"], state_of().params["w"])
