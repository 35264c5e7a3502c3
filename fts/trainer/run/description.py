"""The description of a run as text."""

from __future__ import annotations

from typing import Any

import attrs

from fts import steps
from fts.trainer.arguments import Plan


def describe_run(plan: Plan, step: Any, processes: str = "1, one process") -> str:
    """The plan and the step of a run as a tree.

    Args:
        plan: of the run.
        step: of the run.
        processes: their number, and the strategy.

    >>> from fts.trainer import TrainingArguments
    >>> from fts.trainer.run.plan import make_plan
    >>> plan = make_plan(TrainingArguments(num_train_epochs=1), batches=10, num_examples=80)
    >>> describe_run(plan, lambda state, batch: None).splitlines()[:3]
    ['run', '├── plan', '│   ├── total_steps: 10']
    """
    values = attrs.asdict(plan, filter=lambda field, value: field.name != "schedule" and value is not None)
    lines = [f"{name}: {value}" for name, value in values.items()]
    lines.append(f"processes: {processes}")
    lines.append(f"learning rate: {describe_learning_rate(plan)}")
    below = steps.describe(step).splitlines()
    return "\n".join(["run", "├── plan", *_branches(lines), f"└── {below[0]}", *(f"    {line}" for line in below[1:])])


def describe_learning_rate(plan: Plan) -> str:
    """The learning rate at the beginning, at its middle and at the last update.

    >>> from fts.trainer import TrainingArguments
    >>> from fts.trainer.run.plan import make_plan
    >>> describe_learning_rate(make_plan(TrainingArguments(max_steps=10, learning_rate=1.0), batches=None, num_examples=None))
    '1 at first, 0.5 after 5 updates, 0.1 at the last'
    """
    middle = plan.total_steps // 2
    first, half, last = (float(plan.schedule(step)) for step in (0, middle, plan.total_steps - 1))
    return f"{first:.3g} at first, {half:.3g} after {middle} updates, {last:.3g} at the last"


def _branches(lines: list[str]) -> list[str]:
    return ["│   " + ("└── " if line is lines[-1] else "├── ") + line for line in lines]
