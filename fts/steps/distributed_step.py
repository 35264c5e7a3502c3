"""One step, taken by several processes."""

from __future__ import annotations

from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.steps.batch_context import WithFullBatch
from fts.steps.collectives import Collectives
from fts.steps.compiled import CompiledStep, Graphs
from fts.steps.gradients import ValueAndGrad
from fts.steps.manual_backward import ManualBackward
from fts.steps.nonfinite import CheckedStep, FiniteGradients
from fts.steps.train_step import TrainStep


def with_collectives(step: Any, among: Collectives) -> Any:
    """The same step, whose loss and gradients are those of the micro-batches of several processes.

    Args:
        step: what `train_step`, `gradient_step` or `compile` made, also inside `with_full_batch` and the like; or gradients.
        among: the processes, such as `fts.distributed.distribute` makes them.

    Returns:
        A step of the same kind.

    Raises:
        ArgumentError: the step is a function that nobody can look into.
    """
    if isinstance(step, (ValueAndGrad, ManualBackward)):
        return attrs.evolve(step, among=among)
    if isinstance(step, (TrainStep, FiniteGradients)):
        return attrs.evolve(step, gradients=with_collectives(step.gradients, among))
    if isinstance(step, CompiledStep):
        return attrs.evolve(step, step=with_collectives(step.step, among), graphs=Graphs())
    if isinstance(step, (WithFullBatch, CheckedStep)):
        return attrs.evolve(step, step=with_collectives(step.step, among))
    raise ArgumentError(
        f"A {type(step).__name__} cannot be spread over processes: nobody can tell where its gradients are. Spread the gradients "
        "(steps.value_and_grad(...)) that it is composed of."
    )


def gradients_of(step: Any) -> Any:
    """What computes the gradients of a step: a `ValueAndGrad` or `ManualBackward`; None for any other function."""
    if isinstance(step, (ValueAndGrad, ManualBackward)):
        return step
    inner = getattr(step, "gradients", None) or getattr(step, "step", None)
    return None if inner is None else gradients_of(inner)
