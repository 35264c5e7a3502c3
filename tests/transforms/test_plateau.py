import math
import random

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.testing import check_transform
from tests.transforms.trajectories import assert_close, by_apply, by_update, make_gradients, make_params

RATE = 0.1


def metrics_of(seed, count=60):
    """Values that fall, stand, jump and repeat, with a few that are no numbers."""
    rng, value, values = random.Random(seed), 1.0, []
    for _ in range(count):
        value += rng.choice([-0.1, -0.02, -1e-5, 0.0, 0.03])
        values.append(rng.choice([value] * 20 + [math.nan, math.inf]))
    return values


def rates_by_rule(rule, metrics):
    state = tx.reduce_on_plateau(tx.sgd, RATE, rule).init({"w": torch.zeros(1)})
    rates = []
    for metric in metrics:
        state = tx.update_on_metric(state, metric, rule)
        rates.append(tx.followed_rate(state).item())
    return rates


def rates_by_scheduler(make, metrics):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], RATE)
    scheduler, rates = make(optimizer), []
    for metric in metrics:
        scheduler.step(metric)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patience": 0, "factor": 0.5},
        {"patience": 1, "cooldown": 2, "factor": 0.7},
        {"patience": 2, "threshold": 0.05, "threshold_mode": "abs"},
        {"patience": 1, "threshold": 0.02, "threshold_mode": "rel", "factor": 0.9},
        {"patience": 0, "min_lr": 0.013, "factor": 0.5},
        {"patience": 0, "eps": 0.02, "factor": 0.5},
        {"patience": 0, "factor": 0.0},
        {"patience": 0, "min_lr": 0.5},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_plateau_is_that_of_torch(options, mode, seed):
    metrics = metrics_of(seed)
    ours = rates_by_rule(tx.Plateau(mode=mode, **options), metrics)
    assert ours == rates_by_scheduler(lambda o: ReduceLROnPlateau(o, mode, **options), metrics)
    assert len(set(ours)) > 1 or options in ({}, {"patience": 0, "min_lr": 0.5}) or options.get("patience") == 2


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    "options",
    [
        {"patience": 0},
        {"patience": 1, "factor": 0.5, "min_lr": 0.01, "max_lr": 0.3},
        {"patience": 0, "cooldown": 2, "warmup": 3, "factor": 0.8},
        {"patience": 1, "threshold": 0.02, "threshold_mode": "rel"},
        {"patience": 0, "factor": 0.3, "min_lr": 0.05, "reset_start": 2, "cooldown": 1, "warmup": 1},
        {"patience": 0, "smooth": True, "window_size": 4, "factor": 0.7},
        {"patience": 0, "smooth": True, "window_size": 3, "factor": 0.3, "min_lr": 0.09, "reset_start": 1},
        {"patience": 0, "eps": 0.01, "factor": 0.8},
        {"patience": 0, "min_lr": 0.5, "reset_start": 3},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_that_of_transformers(options, mode, seed):
    metrics = [m for m in metrics_of(seed) if math.isfinite(m)]
    ours = rates_by_rule(tx.Greedy(mode=mode, **options), metrics)
    theirs = rates_by_scheduler(lambda o: GreedyLR(o, mode=mode, **options), metrics)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert len(set(ours)) > 1


def test_greedy_forgets_a_nan_that_has_left_its_window():
    rule, lr = tx.Greedy(smooth=True, window_size=3, patience=0), torch.tensor(0.1, dtype=torch.float64)
    memory = rule.start(lr)
    metrics = [1.0, math.nan, 2.0, 3.0, 7.0]
    for number, metric in enumerate(metrics):
        lr, memory = rule.after(lr, memory, torch.tensor(metric, dtype=torch.float64))
        known = metrics[max(0, number - 2) : number + 1]
        assert float(memory["sum"]) == pytest.approx(sum(known), nan_ok=True)


MAKERS = {
    "sgd": lambda lr: tx.sgd(lr, momentum=0.9),
    "adamw": lambda lr: tx.adamw(lr, weight_decay=0.1),
    "chain": lambda lr: tx.chain(tx.clip_by_global_norm(1.0), tx.adam(lr)),
    "pure": lambda lr: tx.chain(tx.centralize(), tx.scale_by_learning_rate(lr)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_laws(name):
    check_transform(tx.reduce_on_plateau(MAKERS[name], RATE, tx.Plateau()))


def test_laws_with_the_memory_of_greedy():
    check_transform(tx.reduce_on_plateau(tx.sgd, RATE, tx.Greedy(smooth=True)))


@pytest.mark.parametrize("run", [by_update, by_apply])
@pytest.mark.parametrize("name", MAKERS)
def test_updates_have_the_rate_of_the_state(name, run):
    rule = tx.Plateau(patience=0, factor=0.5)
    params, gradients = make_params(), make_gradients(6)
    transform = tx.chain(tx.scale(1.0), tx.reduce_on_plateau(MAKERS[name], RATE, rule))
    found, state = params, transform.init(params)
    plain, plain_state = params, MAKERS[name](RATE).init(params)
    for i, grads in enumerate(gradients):
        rate = RATE * 0.5 ** (i // 2)
        plain, plain_state = step(MAKERS[name](rate), run, grads, plain_state, plain)[:2]
        found, state, info = step(transform, run, grads, state, found)
        assert info["lr"].item() == pytest.approx(rate, rel=1e-12)
        if i % 2 == 1:
            state = tx.update_on_metric(tx.update_on_metric(state, 1.0, rule) if i == 1 else state, 1.0, rule)
    assert_close(found, plain)


def step(transform, run, grads, state, params):
    if run is by_apply and transform.apply is not None:
        copies = torch.utils._pytree.tree_map(torch.clone, (dict(grads), state, dict(params)))
        return transform.apply(*copies)
    updates, state, info = transform.update(grads, state, params)
    return tx.apply_updates(params, updates), state, info


def test_the_state_is_found_anywhere_and_stays_valid():
    rule = tx.Plateau(patience=0, factor=0.5)
    following = tx.reduce_on_plateau(tx.sgd, RATE, rule)
    for transform in (
        following,
        tx.chain(tx.scale(1.0), last=following),
        tx.skip_nonfinite(tx.multi_steps(following, 2)),
        tx.ema_params(following, 0.9),
        tx.partition({1: following, 2: following}, lambda name, p: 1 + (p.ndim > 1)),
        tx.reduce_on_plateau(lambda lr: following, RATE, rule),
    ):
        before = transform.init(make_params())
        after = tx.update_on_metric(tx.update_on_metric(before, 1.0, rule), torch.tensor(1.0), rule)
        assert tx.steps_on_metric(before)
        assert tx.followed_rate(before).item() == RATE
        assert tx.followed_rate(after).item() == RATE / 2
        _, spec = torch.utils._pytree.tree_flatten(before)
        assert torch.utils._pytree.tree_flatten(after)[1] == spec
        transform.update(make_gradients(1)[0], after, make_params())


def test_errors():
    state = tx.sgd(0.1).init({"w": torch.zeros(1)})
    with pytest.raises(ArgumentError, match=r"No rate in this state follows a metric: make .* reduce_on_plateau"):
        tx.update_on_metric(state, 1.0, tx.Plateau())
    assert not tx.steps_on_metric(state)
    with pytest.raises(ArgumentError, match="No rate in this state"):
        tx.followed_rate(state)
    with pytest.raises(ArgumentError, match="the metric must be a number, not 'loss'"):
        tx.update_on_metric(state, "loss", tx.Plateau())
    with pytest.raises(ArgumentError, match="takes a rule such as Plateau"):
        tx.reduce_on_plateau(tx.sgd, 0.1, tx.Plateau)
    with pytest.raises(ArgumentError, match=r"lr must be a number in \[0, inf\), not -1"):
        tx.reduce_on_plateau(tx.sgd, -1, tx.Plateau())
    with pytest.raises(ArgumentError, match="takes a function that makes a transform for a rate"):
        tx.reduce_on_plateau(tx.sgd(0.1), 0.1, tx.Plateau())
    with pytest.raises(ArgumentError, match="reduce_on_plateau takes transforms"):
        tx.reduce_on_plateau(float, 0.1, tx.Plateau())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tx.Plateau(factor=1.0), r"Plateau: factor .* \[0, 1\), not 1.0"),
        (lambda: tx.Plateau(mode="least"), "mode must be 'min' or 'max', not 'least'"),
        (lambda: tx.Plateau(threshold_mode="x"), "threshold_mode must be 'rel' or 'abs', not 'x'"),
        (lambda: tx.Plateau(patience=1.5), "patience must be an integer"),
        (lambda: tx.Plateau(min_lr=-1), "min_lr must be a number"),
        (lambda: tx.Greedy(factor=0), "Greedy: factor .* not 0"),
        (lambda: tx.Greedy(window_size=0), "window_size .* at least 1, not 0"),
        (lambda: tx.Greedy(smooth="yes"), "smooth must be True or False, not 'yes'"),
        (lambda: tx.Greedy(max_lr=math.inf), "max_lr .* not inf"),
    ],
)
def test_rules_are_checked(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_label():
    transform = tx.reduce_on_plateau(tx.sgd, 0.1, tx.Plateau())
    assert transform.label == "reduce_on_plateau(0.1, Plateau)"
    assert transform.children[0].label == "sgd(lr=0.1)"
