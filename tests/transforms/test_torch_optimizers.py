"""Bridged torch optimizers against the same optimizers run by hand."""

import copy as copying
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fts
from fts import steps, transforms as tx
from fts.errors import ArgumentError, CompileFallbackWarning, DonatedStateError, ScheduleError, UnknownParameterError
from fts.testing import check_transform, strategies
from tests.transforms.trajectories import assert_close, by_apply, by_update, copy, make_gradients, make_params

MATRICES = ("w", "kernel")
STEPS = 6


def two_groups(names):
    """Options of the second group differ in the learning rate."""
    return [{"params": [n for n in names if n != "b"]}, {"params": [n for n in names if n == "b"], "lr": 0.02}]


def transformers_adafactor(groups: Any, **options: Any) -> Any:
    return pytest.importorskip("transformers.optimization").Adafactor(groups, **options)


def package(module: str, name: str) -> Callable[..., Any]:
    def make(groups: Any, **options: Any) -> Any:
        return getattr(pytest.importorskip(module), name)(groups, **options)

    return make


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW, amsgrad": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "AdamW, fused": (torch.optim.AdamW, {"lr": 0.05, "fused": True}),
    "AdamW, lr tensor": (torch.optim.AdamW, {"lr": torch.tensor(0.05)}),
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD, momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "SGD, dampening": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.3}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5, "centered": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.05}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.05}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.05, "t0": 2.0}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.05}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.05}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
    "Adafactor of transformers": (transformers_adafactor, {"lr": 0.05, "relative_step": False, "beta1": 0.9}),
    "schedule-free AdamW": (package("schedulefree", "AdamWScheduleFree"), {"lr": 0.05, "warmup_steps": 3}),
    "schedule-free SGD": (package("schedulefree", "SGDScheduleFree"), {"lr": 0.05, "foreach": False}),
    "schedule-free RAdam": (package("schedulefree", "RAdamScheduleFree"), {"lr": 0.05}),
    "Lion": (package("lion_pytorch", "Lion"), {"lr": 0.05, "weight_decay": 0.1}),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = (torch.optim.Muon, {"lr": 0.05})


def start(name: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    params, gradients = make_params(dtype), make_gradients(STEPS, dtype)
    if name == "Muon":
        params, *gradients = [{"w": tree["w"], "b": tree["w"].flip(0) * 2} for tree in (params, *gradients)]
    return params, gradients


def by_hand(factory, options, params, gradients, groups=two_groups, rate=None):
    """The optimizer as a torch loop runs it; the parameters, and what it holds in the end."""
    own = {name: nn.Parameter(tensor.clone()) for name, tensor in params.items()}
    named = [{"params": list(own)}] if groups is None else groups(list(own))
    optimizer = factory([{**group, "params": [own[name] for name in group["params"]]} for group in named], **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    rates = [group["lr"] for group in optimizer.param_groups]
    for i, grads in enumerate(gradients):
        if rate is not None:
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * rate(i)
        for name, parameter in own.items():
            parameter.grad = grads[name].clone()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in own.items()}, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory_is_that_of_the_torch_loop(name, dtype):
    factory, options = OPTIMIZERS[name]
    params, gradients = start(name, dtype)
    expected, optimizer = by_hand(factory, options, params, gradients)
    transform = tx.from_torch(factory, groups=two_groups, **options)
    found, state, info = by_apply(transform, params, gradients)
    assert_close(found, expected, rtol=0, atol=0)
    assert int(state.step) == STEPS
    assert info["lr"].item() == pytest.approx(0.5 if name == "Adadelta" else 0.05)
    # the pure update rounds once more, when updates are taken apart from parameters
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert_close(by_update(transform, params, gradients)[0], expected, rtol=tolerance, atol=tolerance)
    kept = optimizer.state[optimizer.param_groups[1]["params"][0]]
    for key, value in kept.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(state.params["b"][key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"relative_step": True, "warmup_init": True}, {"lr": 0.05, "relative_step": False, "scale_parameter": True}]
)
def test_an_optimizer_that_keeps_python_numbers(options):
    params, gradients = start("", torch.float32)
    expected, _ = by_hand(transformers_adafactor, options, params, gradients, groups=None)
    found, state, info = by_apply(tx.from_torch(transformers_adafactor, **options), params, gradients)
    assert_close(found, expected, rtol=0, atol=0)
    assert state.params["w"]["step"].integer.dtype == torch.int64 and int(state.params["w"]["step"].integer) == STEPS
    # without an lr there is none to report
    assert ("lr" in info) == ("lr" in options)


def test_an_optimizer_that_keeps_numbers_in_its_groups():
    prodigy = package("prodigyopt", "Prodigy")
    params, gradients = start("", torch.float32)
    gradients = gradients[:1] * STEPS
    params["b"] = torch.zeros_like(params["b"])  # of which it keeps a single number
    expected, optimizer = by_hand(prodigy, {"lr": 1.0, "d0": 1e-3}, params, gradients, groups=None)
    transform = tx.from_torch(prodigy, lr=1.0, d0=1e-3)
    found, state, _ = by_apply(transform, params, gradients)
    assert_close(found, expected, rtol=0, atol=0)
    group = optimizer.param_groups[0]
    assert group["d"] > 1e-3
    assert state.groups[0]["d"].floating.item() == group["d"]
    assert int(state.groups[0]["k"].integer) == STEPS
    assert state.params["b"]["p0"].shape == ()
    assert not {"lr", "betas", "eps", "weight_decay", "d0"} & state.groups[0].keys()


class Hidden(torch.optim.Optimizer):
    """Keeps what it should keep in its state elsewhere, or something that is neither tensor nor number."""

    def __init__(self, params, lr=0.1, kind="attribute"):
        super().__init__(params, {"lr": lr, "kind": kind})
        self.steps, self.mean, self.history = 0, None, []

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                self.mean = p.grad.mean().float() + (0 if self.mean is None else self.mean)
                p.sub_((group["lr"] / self.steps * self.mean).to(p.dtype))
                kind = group["kind"]
                if kind == "common":
                    self.state["sums"] = self.state.get("sums", 0.0) + float(self.mean)
                elif kind == "text":
                    self.state[p]["mode"] = "fast"
                elif kind == "object key":
                    self.state[3] = {"x": 1.0}
                elif kind == "grows":
                    self.history.append(self.steps)
                elif kind == "late":
                    self.state[p].setdefault("slow", p.clone()) if self.steps == 3 else None
                elif kind == "late group" and self.steps == 3:
                    group["lr"] = 0.0
                elif kind == "replaces":
                    p.data = p.data * 1.5
                elif kind == "keeps gradient":
                    self.state[p]["last"] = p.grad
                elif kind == "random":
                    p.add_(torch.rand(()).to(p.dtype))


def test_attributes_and_shared_state_are_in_the_state():
    params, gradients = start("", torch.float32)
    expected, optimizer = by_hand(Hidden, {"kind": "common"}, params, gradients, groups=None)
    transform = tx.from_torch(Hidden, kind="common")
    found, state, _ = by_apply(transform, params, gradients)
    assert_close(found, expected, rtol=0, atol=0)
    assert int(state.attributes["steps"].integer) == STEPS
    assert state.common["sums"].floating.item() == optimizer.state["sums"]
    # a given optimizer's attributes are as before
    own = {name: nn.Parameter(tensor.clone()) for name, tensor in params.items()}
    mine = Hidden(own.values(), kind="common")
    assert_close(by_apply(tx.from_torch(mine, parameters=own), params, gradients)[0], expected, rtol=0, atol=0)
    assert mine.steps == 0 and mine.mean is None and mine.state == {}


@pytest.mark.parametrize(
    ("kind", "words"),
    [("text", "'mode'.*'fast'.*cannot represent"), ("object key", "under 3"), ("grows", "history.*list of 8.*list of 4")],
)
def test_what_cannot_be_represented(kind, words):
    with pytest.raises(ArgumentError, match=words):
        tx.from_torch(Hidden, kind=kind).init(make_params())


@pytest.mark.parametrize(
    ("kind", "words"), [("late", "became a dictionary of"), ("late group", r"changed \['lr'\] of its param_groups")]
)
def test_a_structure_that_changes_later(kind, words):
    params, gradients = start("", torch.float32)
    with pytest.raises(ArgumentError, match=words):
        by_apply(tx.from_torch(Hidden, kind=kind), params, gradients)


def test_a_tensor_that_replaces_the_parameters_is_written_into_it():
    params, gradients = start("", torch.float32)
    expected, _ = by_hand(Hidden, {"kind": "replaces"}, params, gradients, groups=None)
    transform, mine = tx.from_torch(Hidden, kind="replaces"), copy(params)
    state = transform.init(mine)
    for grads in gradients:
        after, state, _ = transform.apply(copy(grads), state, mine)
        assert all(after[name] is tensor for name, tensor in mine.items())
    assert_close(mine, expected, rtol=0, atol=0)


def test_trial_steps_draw_no_numbers_from_the_generator():
    torch.manual_seed(0)
    tx.from_torch(Hidden, kind="random").init(make_params())
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("name", ["SGD, momentum", "schedule-free AdamW"])
def test_schedule_is_a_factor_on_each_rate(name):
    factory, options = OPTIMIZERS[name]
    params, gradients = start(name, torch.float32)

    def rate(count):
        return 1.0 / (1 + count)

    expected, _ = by_hand(factory, options, params, gradients, rate=rate)
    transform = tx.from_torch(factory, groups=two_groups, schedule=rate, **options)
    found, _, info = by_apply(transform, params, gradients)
    assert_close(found, expected, rtol=0, atol=0)
    assert info["lr"].item() == pytest.approx(0.05 / STEPS)
    assert info["lr"].ndim == 0
    if name == "SGD, momentum":
        scheduled = tx.from_torch(factory, lr=0.05, schedule=tx.linear_schedule(1.0, 0.0, 4))
        assert scheduled.label == "from_torch(SGD, lr=0.05, schedule=" + scheduled.label.split("schedule=")[1]


def test_a_schedule_must_be_usable():
    params, gradients = start("", torch.float32)
    with pytest.raises(ScheduleError, match="returned -1"):
        by_apply(tx.from_torch(torch.optim.SGD, lr=0.1, schedule=lambda step: -1.0), params, gradients)
    with pytest.raises(ArgumentError, match="schedule must be a function"):
        tx.from_torch(torch.optim.SGD, lr=0.1, schedule=0.5)
    with pytest.raises(ArgumentError, match="factor on lr"):
        tx.from_torch(transformers_adafactor, schedule=lambda step: 1.0).init(params)


# ----- a given optimizer


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch_at(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(16, 4, generator=generator), torch.randn(16, 1, generator=generator)


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def torch_loop(model, optimizer, count, scheduler=None):
    for i in range(count):
        optimizer.zero_grad()
        squares(model, batch_at(i)).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.AdamW(ps, lr=0.05),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
        lambda ps: package("schedulefree", "AdamWScheduleFree")(ps, lr=0.05),
    ],
)
def test_an_optimizer_of_a_model_in_a_step(make, donate):
    model, twin = small_model(), small_model()
    by_torch = make(twin.parameters())
    if hasattr(by_torch, "train"):
        by_torch.train()
    torch_loop(twin, by_torch, STEPS)
    optimizer = make(model.parameters())
    transform = tx.from_torch(optimizer, parameters=dict(model.named_parameters()))
    before = copying.deepcopy(optimizer.state_dict())
    memory = {name: p.data_ptr() for name, p in model.named_parameters()}
    state = fts.TrainState.create(model, transform, copy=not donate)
    step = steps.train_step(steps.module_loss(model, squares), transform, donate=donate)
    for i in range(STEPS):
        old, (state, metrics) = state, step(state, batch_at(i))
    assert_close(state.params, {name: p.detach() for name, p in twin.named_parameters()}, rtol=0, atol=0)
    assert metrics["lr"].item() == 0.05
    # what the optimizer holds is as it was; the model's own memory is trained only where the state has it
    assert optimizer.state_dict() == before
    assert all(p.grad is None and p.data_ptr() == memory[name] for name, p in model.named_parameters())
    assert {name: t.data_ptr() for name, t in state.params.items()} == memory if donate else True
    trained = squares(model, batch_at(0)).item() == squares(twin, batch_at(0)).item()
    assert trained == donate
    if donate:
        with pytest.raises(DonatedStateError):
            old.params  # noqa: B018


def test_changes_of_a_torch_scheduler_are_followed():
    model, twin = small_model(), small_model()
    by_torch = torch.optim.AdamW(twin.parameters(), lr=0.1)
    torch_loop(twin, by_torch, STEPS, torch.optim.lr_scheduler.LinearLR(by_torch, 1.0, 0.1, total_iters=STEPS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    transform = tx.from_torch(optimizer, parameters=dict(model.named_parameters()))
    state = fts.TrainState.create(model, transform)
    step = steps.train_step(steps.module_loss(model, squares), transform)
    rates = []
    for i in range(STEPS):
        state, metrics = step(state, batch_at(i))
        rates.append(metrics["lr"].item())
        scheduler.step()
    assert rates == pytest.approx([0.1 * (1 - 0.9 * i / STEPS) for i in range(STEPS)])
    assert_close(state.params, {name: p.detach() for name, p in twin.named_parameters()}, rtol=0, atol=0)


def test_parameters_that_a_given_optimizer_does_not_train():
    model = small_model()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    transform = tx.from_torch(optimizer, parameters=dict(model.named_parameters()))
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: torch.ones_like(p) for name, p in params.items()}
    updates, state, _ = transform.update(grads, transform.init(params), params)
    assert {name for name, update in updates.items() if update.any()} == {"2.weight", "2.bias"}
    assert set(state.params) == {"2.weight", "2.bias"}
    # and one that is in the groups but frozen
    model[2].bias.requires_grad_(False)
    state = fts.TrainState.create(model, transform)
    step = steps.train_step(steps.module_loss(model, squares), transform)
    after, _ = step(state, batch_at(0))
    assert set(after.opt_state.params) == {"2.weight"}
    assert not torch.equal(after.params["2.weight"], state.params["2.weight"])


def test_a_used_optimizer_goes_on_from_its_state():
    model, twin = small_model(), small_model()
    by_torch, optimizer = (torch.optim.Adam(m.parameters(), lr=0.1) for m in (twin, model))
    torch_loop(twin, by_torch, STEPS)
    torch_loop(model, optimizer, 2)
    transform = tx.from_torch(optimizer, parameters=dict(model.named_parameters()))
    state = fts.TrainState.create(model, transform)
    step = steps.train_step(steps.module_loss(model, squares), transform)
    for i in range(2, STEPS):
        state, _ = step(state, batch_at(i))
    assert_close(state.params, {name: p.detach() for name, p in twin.named_parameters()}, rtol=0, atol=0)
    assert all(float(entry["step"]) == 2 for entry in optimizer.state.values())


def test_hooks_run_in_steps_only():
    model, seen = small_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *args: seen.append(1))
    transform = tx.from_torch(optimizer, parameters=dict(model.named_parameters()))
    state = fts.TrainState.create(model, transform)
    assert not seen
    steps.train_step(steps.module_loss(model, squares), transform)(state, batch_at(0))
    assert seen == [1]


# ----- arguments


def test_arguments_that_do_not_go_together():
    model = small_model()
    optimizer, names = torch.optim.SGD(model.parameters(), lr=0.1), dict(model.named_parameters())
    with pytest.raises(ArgumentError, match=r"parameters=dict\(model.named_parameters\(\)\)"):
        tx.from_torch(optimizer)
    with pytest.raises(ArgumentError, match="the first has the shape"):
        tx.from_torch(optimizer, parameters=dict(small_model().named_parameters()))
    with pytest.raises(ArgumentError, match=r"\['groups', 'lr'\] are for a class"):
        tx.from_torch(optimizer, parameters=names, groups=[], lr=0.1)
    with pytest.raises(ArgumentError, match="parameters= is for an optimizer"):
        tx.from_torch(torch.optim.SGD, parameters=names)
    with pytest.raises(ArgumentError, match="takes an optimizer, a class"):
        tx.from_torch("adamw")
    with pytest.raises(ArgumentError, match="no param_groups, state and step"):
        tx.from_torch(lambda groups: None).init(make_params())
    with pytest.raises(ArgumentError, match="holds none of the trained parameters"):
        tx.from_torch(optimizer, parameters=names).init(make_params())
    with pytest.raises(ArgumentError, match="needs the parameters"):
        tx.from_torch(torch.optim.SGD).update(make_params(), (), None)


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ([{"params": ["w"]}], ArgumentError, r"\['b', 'kernel', 's'\] are in no group.*Add them"),
        ([{"params": ["w", "b", "kernel", "s", "x"]}], UnknownParameterError, r"\['x'\], which are not trained"),
        ([{"params": ["w", "b", "kernel", "s"]}, {"params": ["b"]}], ArgumentError, r"\['b'\] are in two groups"),
        ([{"params": "w"}], ArgumentError, "collection of names"),
        ([["w"]], ArgumentError, "must be a list of"),
    ],
)
def test_groups_must_name_each_parameter_once(groups, error, words):
    for given in (groups, lambda names: groups):
        with pytest.raises(error, match=words):
            tx.from_torch(torch.optim.SGD, groups=given, lr=0.1).init(make_params())


def test_labels():
    assert tx.from_torch(torch.optim.AdamW, lr=0.1, eps=1e-6).label == "from_torch(AdamW, lr=0.1, eps=1e-06)"
    model = small_model()
    given = tx.from_torch(torch.optim.SGD(model.parameters(), lr=0.3), parameters=dict(model.named_parameters()))
    assert given.label == "from_torch(SGD, lr=0.3)"


# ----- where it cannot run


def test_no_graph_vmap_or_derivative():
    transform, params, grads = tx.from_torch(torch.optim.SGD, lr=0.1), make_params(), make_gradients(1)[0]
    state = transform.init(params)
    with pytest.raises(ArgumentError, match=r"from_torch\(SGD, lr=0.1\) runs a torch optimizer.*torch.vmap"):
        torch.vmap(lambda g: transform.update(g, state, params)[0])({name: g[None] for name, g in grads.items()})
    with pytest.raises(ArgumentError, match="runs a torch optimizer"):
        torch.func.grad(lambda p: transform.update(grads, transform.init(p), p)[0]["s"])(params)
    wanted = {name: g.clone().requires_grad_() for name, g in grads.items()}
    with pytest.raises(ArgumentError, match=r"cannot be differentiated.*no_grad"):
        transform.update(wanted, state, params)
    with torch.no_grad():
        transform.update(wanted, state, params)


@pytest.mark.parametrize("donate", [False, True])
def test_a_compiled_step_warns_once_and_runs_eagerly(donate):
    model = small_model()
    transform = tx.chain(tx.clip_by_global_norm(1.0), tx.from_torch(torch.optim.AdamW, lr=0.05))
    step = steps.train_step(steps.module_loss(model, squares), transform)
    compiled = steps.compile(step, backend="eager", donate=donate)
    one = two = fts.TrainState.create(model, transform)
    two = fts.TrainState.create(model, transform)
    with pytest.warns(CompileFallbackWarning, match=r"from_torch\(AdamW, lr=0.05\) runs a torch optimizer"):
        two, _ = compiled(two, batch_at(0))
    one, _ = step(one, batch_at(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(1, 4):
            one, _ = step(one, batch_at(i))
            two, _ = compiled(two, batch_at(i))
    assert_close(two.params, one.params, rtol=0, atol=0)
    assert int(two.step) == 4


# ----- closures


def rosenbrock(params):
    x, y = params["x"], params["y"]
    return (1 - x).square().sum() + 100 * (y - x.square()).square().sum()


def value_and_slopes(params):
    slopes, value = torch.func.grad_and_value(rosenbrock)(params)
    return value, slopes


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_evaluates_the_closure(line_search):
    options = {"lr": 0.5 if line_search else 1e-3, "max_iter": 3, "history_size": 4, "line_search_fn": line_search}
    first = {"x": torch.tensor([-1.0, 0.5]), "y": torch.tensor([1.5, -0.3])}
    own = {name: nn.Parameter(tensor.clone()) for name, tensor in first.items()}
    optimizer = torch.optim.LBFGS(own.values(), **options)

    def closure():
        optimizer.zero_grad()
        loss = rosenbrock(own)
        loss.backward()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
    transform = tx.from_torch(torch.optim.LBFGS, closure=value_and_slopes, **options)
    _, slopes = value_and_slopes(first)
    found, state, _ = by_apply(transform, first, [slopes] * STEPS)
    assert_close(found, {name: p.detach() for name, p in own.items()}, rtol=0, atol=0)
    entry = state.params["x"]
    assert int(entry["stored"].integer) == 4 and int(entry["n_iter"].integer) == optimizer.state[own["x"]]["n_iter"]
    assert_close(by_update(transform, first, [slopes] * STEPS)[0], found, rtol=1e-3, atol=1e-3)
    check_transform(
        transform, params=first, laws=["state_is_tensors", "structure_is_stable", "inputs_unchanged", "state_round_trips"]
    )


def test_lbfgs_needs_a_closure():
    with pytest.raises(ArgumentError, match="Pass closure="):
        tx.from_torch(torch.optim.LBFGS, lr=0.1)
    with pytest.raises(ArgumentError, match="Pass closure="):
        tx.from_torch(lambda groups: torch.optim.LBFGS(groups, lr=0.1)).init(make_params())
    model = small_model()
    with pytest.raises(ArgumentError, match="Pass closure="):
        tx.from_torch(torch.optim.LBFGS(model.parameters()), parameters=dict(model.named_parameters()))
    transform = tx.from_torch(torch.optim.LBFGS, closure=lambda params: (params["w"].sum(), {}))
    params = make_params()
    with pytest.raises(ArgumentError, match="no gradient for 'w'"):
        transform.update(make_gradients(1)[0], transform.init(params), params)


# ----- parameters to evaluate


@pytest.mark.parametrize("name", ["schedule-free AdamW", "schedule-free SGD", "schedule-free RAdam"])
def test_eval_params_are_those_of_the_optimizer_in_eval_mode(name):
    factory, options = OPTIMIZERS[name]
    params, gradients = start(name, torch.float32)
    _, optimizer = by_hand(factory, options, params, gradients)
    optimizer.eval()
    held = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    transform = tx.from_torch(factory, groups=two_groups, **options)
    found, state, _ = by_apply(transform, params, gradients)
    kept = copy((found, state))
    evaluated = tx.eval_params(transform, state, found)
    assert_close(list(evaluated.values()), [held[i] for i in (0, 3, 1, 2)], rtol=0, atol=0)
    assert not torch.equal(evaluated["w"], found["w"])
    assert_close((found, state), kept, rtol=0, atol=0)
    # nothing has been averaged before the first step
    assert_close(tx.eval_params(transform, transform.init(params), params), params, rtol=0, atol=0)


def test_eval_params_finds_the_optimizer_inside_other_transforms():
    bridge = tx.from_torch(package("schedulefree", "AdamWScheduleFree"), lr=0.05)
    plain = tx.from_torch(torch.optim.SGD, lr=0.1)
    params, gradients = start("", torch.float32)
    found, state, _ = by_apply(bridge, params, gradients)
    expected = tx.eval_params(bridge, state, found)
    for outer in (tx.chain(bridge), tx.skip_nonfinite(tx.chain(bridge)), tx.ema_params(bridge, 0.9), tx.multi_steps(bridge, 1)):
        found, state, _ = by_apply(outer, params, gradients)
        assert_close(tx.eval_params(outer, state, found), expected)
    halves = tx.partition({"free": bridge, "plain": plain}, lambda name, p: "free" if name == "w" else "plain")
    found, state, _ = by_apply(halves, params, gradients)
    evaluated = tx.eval_params(halves, state, found)
    assert evaluated["b"] is found["b"] and not torch.equal(evaluated["w"], found["w"])
    with pytest.raises(ArgumentError, match="contains from_torch 2 times, and the state 0 times"):
        tx.eval_params(halves, (), found)
    assert tx.eval_params(tx.adamw(0.1), tx.adamw(0.1).init(params), params)["w"] is params["w"]


def test_the_schedule_free_wrapper_keeps_its_mode_in_the_state():
    wrapper = package("schedulefree", "ScheduleFreeWrapper")

    def make(groups, lr):
        return wrapper(torch.optim.SGD(groups, lr=lr))

    params, gradients = start("", torch.float32)
    params, *gradients = [{"w": tree["w"], "b": tree["b"]} for tree in (params, *gradients)]
    expected, optimizer = by_hand(make, {"lr": 0.05}, params, gradients, groups=None)
    transform = tx.from_torch(make, lr=0.05)
    found, state, _ = by_apply(transform, params, gradients)
    assert_close(found, expected, rtol=0, atol=0)
    optimizer.eval()
    assert_close(
        list(tx.eval_params(transform, state, found).values()), [p.detach() for p in optimizer.param_groups[0]["params"]]
    )


# ----- laws

UNTRACEABLE = ("vmapped_equals_loop", "differentiable", "traced_equals_eager", "traced_once")

"""Laws of transforms that run in graphs and under torch.func; a torch optimizer does neither."""


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Muon"])
def test_laws(name):
    factory, options = OPTIMIZERS[name]
    # torch's Adafactor divides by the size of a parameter
    params = strategies.params(dtypes=[torch.float32, torch.float64], empty=name != "Adafactor")
    check_transform(tx.from_torch(factory, **options), params=params, skip=UNTRACEABLE)


def test_laws_of_a_kept_gradient():
    check_transform(tx.from_torch(Hidden, kind="keeps gradient"), laws=["state_owns_its_memory", "apply_equals_update"])


@pytest.mark.parametrize("name", ["AdamW", "Adafactor of transformers", "schedule-free AdamW", "Adagrad"])
def test_a_saved_run_resumes_and_replays(name, tmp_path):
    factory, options = OPTIMIZERS[name]
    model = small_model()
    step_of = lambda transform: steps.train_step(steps.module_loss(model, squares), transform)  # noqa: E731
    transform = tx.from_torch(factory, schedule=lambda count: 1.0 / (1 + count), **options)
    step, states = step_of(transform), [fts.TrainState.create(model, transform)]
    for i in range(STEPS):
        states.append(step(states[-1], batch_at(i))[0])
    states[3].save(tmp_path)
    again = tx.from_torch(factory, schedule=lambda count: 1.0 / (1 + count), **options)
    state = fts.TrainState.load(tmp_path, like=fts.TrainState.create(model, again))
    for i in range(3, STEPS):
        state, _ = step_of(again)(state, batch_at(i))
    assert_close(state.params, states[-1].params, rtol=0, atol=0)
    assert_close(state.opt_state, states[-1].opt_state, rtol=0, atol=0)
    # an old state is as it was, and gives the same again
    replayed, _ = step(states[2], batch_at(2))
    assert_close(replayed.params, states[3].params, rtol=0, atol=0)
