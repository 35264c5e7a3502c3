"""Into composed steps, for the gradients inside."""

from __future__ import annotations

from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.state import TrainState
from fts.steps.compiled import CompiledStep
from fts.steps.engines import Value
from fts.steps.finite import IN_GRAPH, FiniteGradients, finite_gradients
from fts.steps.passing import Passing
from fts.steps.precision import unscaled
from fts.steps.train import TrainStep
from fts.transforms.loss_scaling import find_loss_scale
from fts.typing import Batch, Params


def raise_nonfinite(step: Any) -> Any:
    """A step that raises where its loss or a gradient is NaN or infinite, before the update, as `finite_gradients` does.

    Args:
        step: what `train_step`, `gradient_step` or `passing` made.

    Returns:
        A step of the same kind.

    Raises:
        ArgumentError: it is a compiled step, or a function whose gradients cannot be reached.

    >>> from fts import steps, transforms as tx
    >>> type(raise_nonfinite(steps.train_step(lambda params, batch: params["w"].sum(), tx.sgd(0.1)))).__name__
    'TrainStep'
    """
    if isinstance(step, TrainStep):
        return attrs.evolve(step, gradients=finite_gradients(step.gradients))
    if isinstance(step, Passing):
        return attrs.evolve(step, step=raise_nonfinite(step.step))
    if isinstance(step, CompiledStep):
        raise ArgumentError(IN_GRAPH)
    raise ArgumentError(
        f"raise_nonfinite needs a step such as steps.train_step makes, not {type(step).__name__}. In a step of your own, take "
        "its gradients from steps.finite_gradients(steps.value_and_grad(loss))."
    )


def gradients_at(step: Any, state: TrainState, batch: Batch, *args: Any) -> tuple[Value, Params]:
    """The loss and the gradients that a step would update with, without the update.

    Args:
        step: what `train_step`, `gradient_step`, `passing` or `compile` made, or what runs such a step and has it as its `step`.
            Those of a compiled step are computed eagerly, so they are equal to rounding, and under dropout differ.
        state: where; it is not changed.
        batch: of the step.
        args: what the step is given behind the batch.

    Returns:
        `(value, grads)`, as of `value_and_grad`; the gradients without a loss scale.

    Raises:
        ArgumentError: the step is a function whose gradients cannot be reached.

    >>> import fts, torch
    >>> from fts import steps, transforms as tx
    >>> step = steps.train_step(lambda params, batch: (params["w"] * batch).sum(), tx.sgd(0.1))
    >>> value, grads = gradients_at(step, fts.TrainState.create({"w": torch.ones(1)}, tx.sgd(0.1)), torch.tensor([3.0]))
    >>> grads["w"]
    tensor([3.])
    """
    if isinstance(step, TrainStep):
        gradients = step.gradients
        value, grads = (gradients.gradients if isinstance(gradients, FiniteGradients) else gradients)(state, batch, *args)
        return value, unscaled(grads, find_loss_scale(state.opt_state))
    if isinstance(step, Passing):
        return gradients_at(step.step, state, batch, *step.fn(batch), *args)
    if has_gradients(step):
        return gradients_at(step.step, state, batch, *args)
    raise ArgumentError(f"The gradients of {type(step).__name__} cannot be reached: it is not made of fts.steps.train_step.")


def has_gradients(step: Any) -> bool:
    """Whether `gradients_at` can reach the gradients of a step.

    >>> from fts import steps, transforms as tx
    >>> has_gradients(steps.train_step(lambda params, batch: params["w"].sum(), tx.sgd(0.1))), has_gradients(print)
    (True, False)
    """
    return isinstance(step, TrainStep) or (hasattr(step, "step") and has_gradients(step.step))
