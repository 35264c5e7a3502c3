"""Training steps: gradients and a transform, composed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs
from torch import Tensor

from fts.errors import ArgumentError
from fts.state import TrainState
from fts.steps.batch_context import WithFullBatch
from fts.steps.engines import LossAux
from fts.steps.gradients import Engine, value_and_grad
from fts.steps.losses import ModuleLoss
from fts.steps.module_binding import ModuleBinding
from fts.steps.precision import unscale_gradients
from fts.steps.updates import merge_metrics, update_state
from fts.transforms.loss_scaling import check_unscales_first, find_loss_scale
from fts.typing import Batch, Info, LossFn, Metrics, Params, Transform


class GradientFn(Protocol):
    """From a state and a batch to a value and gradients, as of `value_and_grad` and `manual_backward`.

    `binding` is that of the loss's module; None for a plain function. With `inplace_buffers` the forward pass may write
    the state's non-persistent buffers in place.
    """

    @property
    def binding(self) -> ModuleBinding | None: ...

    def __call__(self, state: TrainState, batch: Batch, *args: Any, inplace_buffers: bool = False) -> tuple[LossAux, Params]: ...


@attrs.frozen(eq=False)
class TrainStep:
    """Gradients and a transform, composed into `(state, batch) -> (state, metrics)`; made by `train_step` or `gradient_step`."""

    gradient_fn: GradientFn
    transform: Transform
    donate: bool = False
    gradient_callback: Callable[[Params], Transform | None] | None = None

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        value, grads = self.gradient_fn(state, batch, *args, inplace_buffers=self.donate)
        transform = self.transform
        if self.gradient_callback is not None:
            transform = _call_with_unscaled(self.gradient_callback, grads, find_loss_scale(state.opt_state)) or transform
        after, info = update_state(state, grads, transform, value.buffers, donate=self.donate, step_name="train_step")
        return after, merge_metrics(value.loss, value.metrics, info)

    def check(self, info: Info) -> None:
        """Raise if the transform's info says that training must stop; for devices whose infos are read late."""
        if self.transform.check is not None:
            self.transform.check(info)


def train_step(
    loss: LossFn | ModuleLoss,
    transform: Transform,
    *,
    accumulate: int = 1,
    engine: Engine = "module",
    precision: str | None = None,
    donate: bool = False,
) -> TrainStep:
    """Compose a loss and a transform into a training step.

    Args:
        loss: `loss(params, batch)` or a `module_loss`; returns a 0-d tensor, optionally with weight and metrics.
        transform: the optimizer, such as `tx.adamw(1e-3)`; the same that the state is created with.
        accumulate: the number of micro-batches of a batch, to save memory; the gradient is that of the full batch.
        engine: "module" (fast, with hooks and activation checkpointing) or "func" (`torch.func`; for vmap and graphs).
        precision: None, or "bf16" or "fp16" to compute the loss under autocast while parameters keep their dtype. "fp16" needs
            `tx.dynamic_loss_scale` around the optimizer, whose scale multiplies the loss for the backward pass only.
        donate: reuse the storage of the input state; using that state afterwards raises `DonatedStateError`.

    Returns:
        A step: `(state, batch, *args) -> (state, metrics)`; `args` are passed to the loss. The metrics are 0-d tensors:
        `loss`, the loss function's metrics, and the transform's info such as `lr` and `grad_norm`. A step seeds torch's,
        numpy's and Python's generators: draw your own random numbers from a generator of your own.

    Raises:
        ArgumentError: an argument has a value that cannot work.

    >>> import torch
    >>> from fts import transforms as tx
    >>> optimizer = tx.sgd(0.1)
    >>> state = TrainState.create({"w": torch.tensor([1.0])}, optimizer, seed=0)
    >>> step = train_step(lambda params, batch: (params["w"] * batch).mean(), optimizer)
    >>> state, metrics = step(state, torch.tensor([2.0, 4.0]))
    >>> state.params["w"], metrics["loss"]
    (tensor([0.7000]), tensor(3.))
    """
    _check_transform("train_step", transform)
    return TrainStep(value_and_grad(loss, engine=engine, accumulate=accumulate, precision=precision), transform, donate)


def gradient_step(gradient_fn: GradientFn, transform: Transform, *, donate: bool = False) -> TrainStep:
    """Compose a gradient function and a transform into a training step.

    Args:
        gradient_fn: from `value_and_grad` or `manual_backward`, or a callable with their signature.
        transform: the optimizer; the same that the state is created with.
        donate: as for `train_step`.

    Returns:
        A step: `(state, batch, *args) -> (state, metrics)`; `args` are passed to `gradient_fn`.

    Raises:
        ArgumentError: an argument has a value that cannot work.

    >>> import torch
    >>> from fts import steps, transforms as tx
    >>> gradients = steps.value_and_grad(lambda params, batch: (params["w"] * batch).mean())
    >>> step = gradient_step(gradients, tx.sgd(0.1))
    >>> state = TrainState.create({"w": torch.tensor([1.0])}, tx.sgd(0.1))
    >>> step(state, torch.tensor([2.0]))[0].params["w"]
    tensor([0.8000])
    """
    _check_transform("gradient_step", transform)
    if not callable(gradient_fn) or not hasattr(gradient_fn, "binding"):
        raise ArgumentError(
            f"gradient_step needs a gradient function such as steps.value_and_grad(loss), not {type(gradient_fn).__name__}; it "
            "has a `binding` (None for a plain function) and is called as (state, batch, *args, inplace_buffers=...)."
        )
    return TrainStep(gradient_fn, transform, donate)


def with_gradient_callback(step: Any, fn: Callable[[Params], Transform | None]) -> Any:
    """The same step, which calls a function with its gradients before the update.

    Args:
        step: from `train_step` or `gradient_step`, also inside `with_full_batch`.
        fn: called with the gradients by name, without a loss scale. The update uses what it writes into the tensors or the
            dictionary. It may return another transform with the same state for this one update.

    Returns:
        A step.

    Raises:
        ArgumentError: the step is compiled to one graph, which cannot call back, or of another kind.

    >>> import torch
    >>> from fts import steps, transforms as tx
    >>> step = steps.train_step(lambda params, batch: (params["w"] * batch).sum(), tx.sgd(0.1))
    >>> state = TrainState.create({"w": torch.tensor([1.0])}, tx.sgd(0.1))
    >>> state, _ = with_gradient_callback(step, print)(state, torch.tensor([2.0]))
    {'w': tensor([2.])}
    """
    if isinstance(step, TrainStep):
        return attrs.evolve(step, gradient_callback=fn)
    if isinstance(step, WithFullBatch):
        return attrs.evolve(step, step=with_gradient_callback(step.step, fn))
    raise ArgumentError(
        f"The gradients of a {type(step).__name__} cannot be seen: only steps of train_step and gradient_step that are not "
        "compiled have a gradient callback."
    )


def _call_with_unscaled(fn: Callable[[Params], Transform | None], grads: Params, scale: Tensor | None) -> Transform | None:
    if scale is None:
        return fn(grads)
    unscaled = unscale_gradients(grads, scale)
    transform = fn(unscaled)
    grads.update({name: grad * scale for name, grad in unscaled.items()})
    return transform


def _check_transform(caller: str, transform: Any) -> None:
    if not isinstance(transform, Transform):
        raise ArgumentError(
            f"{caller} needs a Transform such as tx.adamw(1e-3), not {type(transform).__name__}. Make one of a torch optimizer "
            "by tx.from_torch(torch.optim.RMSprop, lr=1e-3)."
        )
    check_unscales_first(transform)
