"""A step of several ranks."""

from __future__ import annotations

from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.steps.batch_context import WithFullBatch
from fts.steps.collectives import Collectives
from fts.steps.compiled_step import CompiledStep, GraphCache
from fts.steps.gradients import ValueAndGrad
from fts.steps.manual_backward import ManualBackward
from fts.steps.nonfinite import CheckedGradients, CheckedStep
from fts.steps.train_step import TrainStep


def with_collectives(step: Any, collectives: Collectives) -> Any:
    """The same step, with the loss and gradients of the micro-batches of all ranks.

    Args:
        step: from `train_step`, `gradient_step` or `compile`, also inside `with_full_batch` and the like; or a gradient function.
        collectives: of the group, as `fts.distributed.distribute` makes them.

    Returns:
        A step of the same kind.

    Raises:
        ArgumentError: the step is a plain function, whose gradients cannot be found.
    """
    if isinstance(step, (ValueAndGrad, ManualBackward)):
        return attrs.evolve(step, collectives=collectives)
    if isinstance(step, (TrainStep, CheckedGradients)):
        return attrs.evolve(step, gradient_fn=with_collectives(step.gradient_fn, collectives))
    if isinstance(step, CompiledStep):
        return attrs.evolve(step, step=with_collectives(step.step, collectives), graphs=GraphCache())
    if isinstance(step, (WithFullBatch, CheckedStep)):
        return attrs.evolve(step, step=with_collectives(step.step, collectives))
    raise ArgumentError(
        f"A {type(step).__name__} cannot be distributed: its gradients cannot be found. Distribute the gradient function "
        "(steps.value_and_grad(...)) that it is composed of."
    )


def find_gradient_fn(step: Any) -> Any:
    """The gradient function of a step: a `ValueAndGrad` or `ManualBackward`; None for any other function."""
    if isinstance(step, (ValueAndGrad, ManualBackward)):
        return step
    inner = getattr(step, "gradient_fn", None) or getattr(step, "step", None)
    return None if inner is None else find_gradient_fn(inner)
