"""One step, taken by several processes."""

from __future__ import annotations

from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.steps.among import Among
from fts.steps.backward import OwnBackward
from fts.steps.compiled import CompiledStep, Graphs
from fts.steps.finite import FiniteGradients, NoticingStep
from fts.steps.gradients import ValueAndGrad
from fts.steps.passing import Passing
from fts.steps.train import TrainStep


def spread(step: Any, among: Among) -> Any:
    """The same step, whose loss and gradients are those of the micro-batches of several processes.

    Args:
        step: what `train_step`, `gradient_step` or `compile` made, also inside `passing` and the like; or gradients.
        among: the processes, such as `fts.distributed.distribute` makes them.

    Returns:
        A step of the same kind.

    Raises:
        ArgumentError: the step is a function that nobody can look into.
    """
    if isinstance(step, (ValueAndGrad, OwnBackward)):
        return attrs.evolve(step, among=among)
    if isinstance(step, (TrainStep, FiniteGradients)):
        return attrs.evolve(step, gradients=spread(step.gradients, among))
    if isinstance(step, CompiledStep):
        return attrs.evolve(step, step=spread(step.step, among), graphs=Graphs())
    if isinstance(step, (Passing, NoticingStep)):
        return attrs.evolve(step, step=spread(step.step, among))
    raise ArgumentError(
        f"A {type(step).__name__} cannot be spread over processes: nobody can tell where its gradients are. Spread the gradients "
        "(steps.value_and_grad(...)) that it is composed of."
    )


def gradients_of(step: Any) -> Any:
    """What computes the gradients of a step: a `ValueAndGrad` or `OwnBackward`; None for a function that nobody can look into."""
    if isinstance(step, (ValueAndGrad, OwnBackward)):
        return step
    inner = getattr(step, "gradients", None) or getattr(step, "step", None)
    return None if inner is None else gradients_of(inner)
