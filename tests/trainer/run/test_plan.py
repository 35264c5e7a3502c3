"""A plan is a function of the arguments and of how much data there is."""

import pytest

from fts.errors import ArgumentError
from fts.trainer import TrainingArguments
from fts.trainer.run.plan import make_plan


@pytest.mark.parametrize(
    ("changes", "batches", "expected"),
    [
        ({}, 10, {"total_steps": 30, "epochs": 3, "steps_per_epoch": 10, "warmup_steps": 0, "precision": None}),
        ({"num_train_epochs": 1.25}, 10, {"total_steps": 13, "epochs": 2, "samples": 100.0}),
        ({"max_steps": 25}, 10, {"total_steps": 25, "epochs": 3, "samples": 200}),
        ({"max_steps": 25}, None, {"total_steps": 25, "epochs": 1, "steps_per_epoch": None}),
        ({"gradient_accumulation_steps": 4}, 10, {"total_steps": 9, "steps_per_epoch": 3, "accumulate": 4}),
        ({"gradient_accumulation_steps": 40}, 10, {"total_steps": 3, "steps_per_epoch": 1}),
        (
            {"warmup_steps": 0.1, "logging_steps": 0.05, "save_steps": 7},
            10,
            {"warmup_steps": 3, "logging_steps": 2, "save_steps": 7},
        ),
        ({"bf16": True, "torch_compile": True}, 10, {"precision": "bf16", "compiled": True}),
    ],
)
def test_plan(changes, batches, expected):
    plan = make_plan(TrainingArguments(**changes), batches=batches, num_examples=80)
    assert {name: getattr(plan, name) for name in expected} == expected
    assert plan == make_plan(TrainingArguments(**changes), batches=batches, num_examples=80)


def test_a_plan_without_an_end_is_an_error():
    with pytest.raises(ArgumentError, match="max_steps=-1 with training data that has no length"):
        make_plan(TrainingArguments(), batches=None, num_examples=None)
