"""The gradients inside a composed step: computed without an update, or checked before it."""

from __future__ import annotations

from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.state import TrainState
from fts.steps.batch_context import WithFullBatch
from fts.steps.compiled_step import CompiledStep
from fts.steps.engines import LossAux
from fts.steps.nonfinite import CHECK_IN_GRAPH, CheckedGradients, raise_if_nonfinite
from fts.steps.precision import unscale_gradients
from fts.steps.train_step import TrainStep
from fts.transforms.loss_scaling import find_loss_scale
from fts.typing import Batch, Params


def with_nonfinite_check(step: Any) -> Any:
    """A step that raises before its update if the loss or a gradient is NaN or infinite; see `raise_if_nonfinite`.

    Args:
        step: from `train_step`, `gradient_step` or `with_full_batch`.

    Returns:
        A step of the same kind.

    Raises:
        ArgumentError: it is a compiled step, or a plain function, whose gradients cannot be found.

    >>> from fts import steps, transforms as tx
    >>> type(with_nonfinite_check(steps.train_step(lambda params, batch: params["w"].sum(), tx.sgd(0.1)))).__name__
    'TrainStep'
    """
    if isinstance(step, TrainStep):
        return attrs.evolve(step, gradient_fn=raise_if_nonfinite(step.gradient_fn))
    if isinstance(step, WithFullBatch):
        return attrs.evolve(step, step=with_nonfinite_check(step.step))
    if isinstance(step, CompiledStep):
        raise ArgumentError(CHECK_IN_GRAPH)
    raise ArgumentError(
        f"with_nonfinite_check needs a step as of steps.train_step, not {type(step).__name__}. In a step of your own, take the "
        "gradients from steps.raise_if_nonfinite(steps.value_and_grad(loss))."
    )


def compute_gradients(step: Any, state: TrainState, batch: Batch, *args: Any) -> tuple[LossAux, Params]:
    """The loss and the gradients of a step, without its update.

    Args:
        step: from `train_step`, `gradient_step`, `with_full_batch` or `compile`, or a wrapper with such a step as its `step`.
            For a compiled step they are computed eagerly: equal to rounding, but different under dropout.
        state: not changed.
        batch: of the step.
        args: further arguments of the step.

    Returns:
        `(value, grads)`, as of `value_and_grad`; the gradients without a loss scale.

    Raises:
        ArgumentError: the step is a plain function, whose gradients cannot be found.

    >>> import fts, torch
    >>> from fts import steps, transforms as tx
    >>> step = steps.train_step(lambda params, batch: (params["w"] * batch).sum(), tx.sgd(0.1))
    >>> value, grads = compute_gradients(step, fts.TrainState.create({"w": torch.ones(1)}, tx.sgd(0.1)), torch.tensor([3.0]))
    >>> grads["w"]
    tensor([3.])
    """
    if isinstance(step, TrainStep):
        gradients = step.gradient_fn
        value, grads = (gradients.gradient_fn if isinstance(gradients, CheckedGradients) else gradients)(state, batch, *args)
        return value, unscale_gradients(grads, find_loss_scale(state.opt_state))
    if isinstance(step, WithFullBatch):
        return compute_gradients(step.step, state, batch, *step.fn(batch), *args)
    if has_gradients(step):
        return compute_gradients(step.step, state, batch, *args)
    raise ArgumentError(f"The gradients of {type(step).__name__} cannot be reached: it is not composed of fts.steps.train_step.")


def has_gradients(step: Any) -> bool:
    """Whether `compute_gradients` supports a step.

    >>> from fts import steps, transforms as tx
    >>> has_gradients(steps.train_step(lambda params, batch: params["w"].sum(), tx.sgd(0.1))), has_gradients(print)
    (True, False)
    """
    return isinstance(step, TrainStep) or (hasattr(step, "step") and has_gradients(step.step))
