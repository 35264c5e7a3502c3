import math

import pytest
import torch
import transformers

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.trainer import TrainingArguments
from fts.trainer.arguments.enums import SchedulerType
from fts.trainer.optimization.schedules import make_metric_rule, make_schedule

PEAK = 3e-4


def arguments(kind, options=None, **others):
    by_metric = kind in ("reduce_lr_on_plateau", "greedy")
    others = {"eval_strategy": "epoch"} | others if by_metric else others
    return TrainingArguments(learning_rate=PEAK, lr_scheduler_type=kind, lr_scheduler_kwargs=options, **others)


def by_transformers(kind, total, warmup, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], PEAK)
    scheduler = transformers.get_scheduler(kind, optimizer, warmup, total, options)
    rates = []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


CASES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 50}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.5}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2, "warmup_lr_rate": 0.3}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.0, "num_cycles": 1.0}),
    ("warmup_stable_decay", {"num_decay_steps": 5}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "num_stable_steps": 4, "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 28, "warmup_type": "cosine", "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "warmup_type": "1-sqrt", "decay_type": "1-sqrt", "num_stable_steps": None}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_cycles": 1.3}),
]


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
@pytest.mark.parametrize(("total", "warmup"), [(30, 0), (30, 1), (30, 7), (30, 29), (9, 40), (1, 0), (30, 30)])
def test_rates_are_those_of_transformers(kind, options, total, warmup):
    if kind == "polynomial" and total == warmup:
        pytest.skip("transformers divides by zero")
    schedule = make_schedule(arguments(kind, options), total, warmup)
    expected = pytest.approx(by_transformers(kind, total, warmup, options), rel=1e-9, abs=1e-18)
    assert [schedule(step) for step in range(total + 1)] == expected
    assert [schedule(torch.tensor(step)).item() for step in range(total + 1)] == expected


def test_every_type_is_compared_or_follows_a_metric():
    by_metric = {"reduce_lr_on_plateau", "greedy"}
    assert {kind for kind, _ in CASES} | by_metric == {kind.value for kind in SchedulerType}
    assert {kind.value for kind in SchedulerType} == {kind.value for kind in transformers.SchedulerType}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("linear", {"num_cycles": 2}, r"lr_scheduler_kwargs has 'num_cycles'=2, but lr_scheduler_type='linear' takes none"),
        ("cosine", {"cycles": 2}, r"has 'cycles'=2, but lr_scheduler_type='cosine' takes num_cycles"),
        ("cosine", {"num_cycles": "many"}, "cycles must be a number .* not 'many'"),
        ("polynomial", {"lr_end": 1.0}, r"lr_end=1.0 must be below learning_rate=0.0003"),
        ("cosine_with_min_lr", {}, "needs min_lr .* or min_lr_rate .* neither was given"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "both was given"),
        ("cosine_warmup_with_min_lr", {"min_lr": -1e-5}, "min_lr=-1e-05 must be a number of at least 0"),
        ("warmup_stable_decay", {}, "num_decay_steps is missing"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "sqrt"}, "decay_shape must be one of .* not 'sqrt'"),
        ("reduce_lr_on_plateau", {"patients": 2}, "has 'patients'=2, but .* takes mode, factor, patience"),
        ("greedy", {"windows": 2}, "has 'windows'=2, but .* takes mode, factor, patience"),
    ],
)
def test_unusable_options(kind, options, words):
    with pytest.raises(ArgumentError, match=words):
        make_schedule(arguments(kind, options), 30, 7)


def test_rules_have_the_options():
    assert make_metric_rule(arguments("linear")) is None
    assert make_metric_rule(arguments("reduce_lr_on_plateau")) == tx.Plateau()
    assert make_metric_rule(arguments("reduce_lr_on_plateau", {"patience": 3, "min_lr": [1e-6, 1e-6]})) == tx.Plateau(
        patience=3, min_lr=1e-6
    )
    assert make_metric_rule(arguments("greedy", {"smooth": True, "verbose": False})) == tx.Greedy(smooth=True)
    for kind, options, words in [
        ("reduce_lr_on_plateau", {"min_lr": [1e-6, 1e-7]}, "all parameter groups share one rate"),
        ("reduce_lr_on_plateau", {"factor": 2.0}, r"lr_scheduler_kwargs={'factor': 2.0} cannot work: Plateau: factor"),
        ("greedy", {"verbose": True}, "verbose=True has no effect"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            make_metric_rule(arguments(kind, options))


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_where_a_metric_decides_the_schedule_is_constant_without_warmup(kind):
    schedule = make_schedule(arguments(kind), 30, 7)
    assert {schedule(step) for step in range(40)} == {PEAK}


def test_an_evaluation_changes_the_rate():
    rule = make_metric_rule(arguments("reduce_lr_on_plateau", {"patience": 0, "factor": 0.5}))
    state = tx.reduce_on_plateau(tx.sgd, PEAK, rule).init({"w": torch.zeros(1)})
    for metric in (0.5, 0.4, math.nan):
        state = tx.update_on_metric(state, metric, rule)
    assert tx.followed_rate(state).item() == pytest.approx(PEAK / 2)  # 0.4 is lower than 0.5, as mode is "min"
