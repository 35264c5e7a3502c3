import copy

import pytest
import torch
from torch import nn

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.trainer import TrainingArguments
from fts.trainer.optimization.optimizer_proxy import OptimizerProxy, SchedulerProxy, make_optimizer_proxy
from fts.trainer.optimization.parameter_groups import make_parameter_groups
from fts.trainer.optimization.schedules import make_schedule
from fts.trainer.optimization.transform import make_transform


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def nothing():
    return None


CASES = {
    "adamw_torch": (torch.optim.AdamW, {"betas": (0.9, 0.98), "eps": 1e-8}, {"adam_beta2": 0.98}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}, {"optim_args": "momentum=0.9"}),
    "adagrad": (torch.optim.Adagrad, {}, {}),
}


def arguments(name, **changes):
    return TrainingArguments(optim=name, learning_rate=0.1, weight_decay=0.2, use_cpu=True, **CASES[name][2], **changes)


def run(args, model, steps=3):
    """The functional run, and the same one by torch: what the proxy reads, and what it should show."""
    cls, options, _ = CASES[args.optim]
    transform = make_transform(args, make_schedule(args, 10, 2), model, total_steps=10)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = transform.init(params)
    twin = copy.deepcopy(model)
    named = dict(twin.named_parameters())
    groups = [{**group, "params": [named[name] for name in group["params"]]} for group in make_parameter_groups(args, twin)]
    optimizer = cls(groups, lr=0.1, **options)
    schedule = make_schedule(args, 10, 2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step) / 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        grads = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
        for name, parameter in named.items():
            parameter.grad = grads[name].clone()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        params, state, _ = transform.apply(grads, state, params)
    return state, schedule, optimizer, scheduler


@pytest.mark.parametrize("name", CASES)
def test_the_view_shows_what_torch_has(name):
    args, model = arguments(name), network()
    state, schedule, optimizer, scheduler = run(args, model)
    proxy = make_optimizer_proxy(args, model, lambda: state)
    proxy.set_lr(schedule(3))
    assert isinstance(proxy, torch.optim.Optimizer)
    assert [id(p) for group in proxy.param_groups for p in group["params"]] == [
        id(dict(model.named_parameters())[name]) for group in make_parameter_groups(args, model) for name in group["params"]
    ]
    theirs, ours = optimizer.state_dict(), proxy.state_dict()
    _assert_alike(ours["param_groups"], theirs["param_groups"])
    assert ours["state"].keys() == theirs["state"].keys()
    for key, entry in theirs["state"].items():
        assert ours["state"][key].keys() == entry.keys()
        for part, value in entry.items():
            torch.testing.assert_close(torch.as_tensor(ours["state"][key][part]), torch.as_tensor(value))
    lr = SchedulerProxy(proxy, schedule, lambda: 3)
    assert isinstance(lr, torch.optim.lr_scheduler.LRScheduler)
    assert lr.get_last_lr() == pytest.approx(scheduler.get_last_lr())
    assert lr.last_epoch == scheduler.last_epoch == 3
    assert lr.base_lrs == scheduler.base_lrs
    theirs = scheduler.state_dict()
    for key, value in lr.state_dict().items():
        assert value == pytest.approx(theirs[key])


def _assert_alike(ours, theirs):
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for key, value in two.items():
            assert one[key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_without_a_state_there_are_no_moments():
    proxy = make_optimizer_proxy(arguments("adamw_torch"), network(), nothing)
    assert dict(proxy.state) == {} and proxy.state_dict()["state"] == {}


def test_gradients_are_cleared():
    model = network()
    proxy = make_optimizer_proxy(arguments("sgd"), model, nothing)
    model(torch.ones(1, 3)).sum().backward()
    proxy.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_rates_keep_the_relation_of_the_groups():
    model = network()
    names = [name for name, _ in model.named_parameters()]
    proxy = OptimizerProxy(model, [{"params": names[:2], "lr": 0.1}, {"params": names[2:], "lr": 0.02}], nothing)
    proxy.set_lr(0.05)
    assert [group["lr"] for group in proxy.param_groups] == pytest.approx([0.05, 0.01])
    assert [group["initial_lr"] for group in proxy.param_groups] == [0.1, 0.02]
    assert SchedulerProxy(proxy, lambda step: 0.1 - 0.01 * step, lambda: 4).get_last_lr() == pytest.approx([0.06, 0.012])


def test_what_is_written_is_noticed():
    proxy = make_optimizer_proxy(arguments("adamw_torch"), network(), nothing)
    assert proxy.changes() is None
    proxy.set_lr(0.07)
    assert proxy.changes() is None
    proxy.param_groups[0]["weight_decay"] = 0.5
    for group in proxy.param_groups:
        group["lr"] = 0.01
    proxy.param_groups[1]["note"] = "new"
    assert proxy.changes() == {0: {"weight_decay": 0.5, "lr": 0.01}, 1: {"lr": 0.01, "note": "new"}}
    assert proxy.changes() is not None  # until it is dealt with
    proxy.accept_changes()
    assert proxy.changes() is None
    proxy.param_groups[0]["betas"] = (0.9, 0.999)
    assert proxy.changes() == {0: {"betas": (0.9, 0.999)}}
    proxy.param_groups[0]["betas"] = (0.9, 0.98)
    assert proxy.changes() is None


def test_what_would_do_nothing_raises():
    model = network()
    proxy = make_optimizer_proxy(arguments("adamw_torch"), model, nothing)
    scheduler = SchedulerProxy(proxy, tx.constant_schedule(0.1), lambda: 0)
    with pytest.raises(ArgumentError, match=r"optimizer.step\(\) of this proxy would do nothing.*optimizers=\(optimizer, None\)"):
        proxy.step()
    with pytest.raises(ArgumentError, match=r"lr_scheduler.step\(\) of this proxy would do nothing"):
        scheduler.step()
    with pytest.raises(ArgumentError, match="resume_from_checkpoint"):
        proxy.load_state_dict(proxy.state_dict())
    with pytest.raises(ArgumentError, match="resume_from_checkpoint"):
        scheduler.load_state_dict(scheduler.state_dict())
    with pytest.raises(ArgumentError, match="fixed when it begins"):
        proxy.add_param_group({"params": list(model.parameters())})
    with pytest.raises(ArgumentError, match="cannot be set"):
        proxy.state = {"a": 1}


def test_where_a_metric_decides_the_state_has_the_rate():
    args = arguments("sgd", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    rule = tx.Plateau(patience=0, factor=0.5)
    state = tx.reduce_on_plateau(tx.sgd, 0.1, rule).init({"w": torch.zeros(1)})
    for _ in range(2):
        state = tx.update_on_metric(state, 1.0, rule)
    for current, rate in ((state, 0.05), (None, 0.1)):
        proxy = make_optimizer_proxy(args, network(), lambda current=current: current)
        assert SchedulerProxy(proxy, make_schedule(args, 10, 2), lambda: 5).get_last_lr() == [rate, rate]
