"""Checks that an optimizer or a step fits the run."""

from __future__ import annotations

from typing import Any

from torch import nn

from fts.errors import ArgumentError
from fts.steps import TrainStep
from fts.trainer.arguments import TrainingArguments


def check_step_model(step: Any, model: nn.Module) -> None:
    """Raise ArgumentError where a step runs another module than the model, whose weights it would not train."""
    while not isinstance(step, TrainStep) and hasattr(step, "step"):
        step = step.step
    binding = step.gradient_fn.binding if isinstance(step, TrainStep) else None
    if binding is not None and binding.module is not model:
        raise ArgumentError(
            f"Trainer(step=...) was made of another {type(binding.module).__name__} than the Trainer's model. Make it of that "
            "one: steps.train_step(steps.module_loss(model), transform)."
        )


def check_rollback(args: TrainingArguments, *, torch_schedule: bool) -> None:
    """Raise ArgumentError where a run cannot roll back.

    Args:
        args: `nonfinite`.
        torch_schedule: whether the user's torch scheduler sets the rates.
    """
    if args.nonfinite == "rollback" and torch_schedule:
        raise ArgumentError(
            "nonfinite='rollback' cannot undo the steps of a torch scheduler of your own. Use nonfinite='skip', or let "
            "lr_scheduler_type make the schedule."
        )
