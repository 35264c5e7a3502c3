"""One step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs
from torch import Tensor

from fts.errors import ArgumentError
from fts.state import TrainState
from fts.steps.batch_context import WithFullBatch
from fts.steps.binding import Binding
from fts.steps.engines import LossAux
from fts.steps.gradients import Engine, value_and_grad
from fts.steps.losses import ModuleLoss
from fts.steps.precision import unscaled
from fts.steps.updates import merge_metrics, next_state
from fts.transforms.loss_scaling import check_unscales_first, find_loss_scale
from fts.typing import Batch, Info, LossFn, Metrics, Params, Transform


class Gradients(Protocol):
    """From a state and a batch to a value and gradients, as `value_and_grad` and `manual_backward` make it.

    `binding` says where the tensors of a module live; None for a plain function. With `own_buffers` the forward pass may write
    the state's non-persistent buffers in place.
    """

    @property
    def binding(self) -> Binding | None: ...

    def __call__(self, state: TrainState, batch: Batch, *args: Any, own_buffers: bool = False) -> tuple[LossAux, Params]: ...


@attrs.frozen(eq=False)
class TrainStep:
    """Gradients and a transform, composed into `(state, batch) -> (state, metrics)`; made by `train_step` or `gradient_step`."""

    gradients: Gradients
    transform: Transform
    donate: bool = False
    on_gradients: Callable[[Params], Transform | None] | None = None

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        value, grads = self.gradients(state, batch, *args, own_buffers=self.donate)
        transform = self.transform
        if self.on_gradients is not None:
            transform = _shown(self.on_gradients, grads, find_loss_scale(state.opt_state)) or transform
        after, info = next_state(state, grads, transform, value.buffers, donate=self.donate, step_name="train_step")
        return after, merge_metrics(value.loss, value.metrics, info)

    def check(self, info: Info) -> None:
        """Raise where the transform's report says that training must not go on; for devices whose reports are read late."""
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
    """Compose a loss and a transform into one step of training.

    Args:
        loss: `loss(params, batch)` or a `module_loss`; returns a 0-d tensor, optionally with weight and metrics.
        transform: the optimizer, such as `tx.adamw(1e-3)`; the same that the state is created with.
        accumulate: into how many micro-batches each batch is cut, to save memory; the gradient is that of the whole batch.
        engine: "module" (fast, with hooks and activation checkpointing) or "func" (`torch.func`; for vmap and graphs).
        precision: None, or "bf16" or "fp16" to compute the loss under autocast while parameters stay as they are. "fp16" needs
            `tx.dynamic_loss_scale` around the optimizer; the loss is multiplied by its scale, and reported as it is.
        donate: reuse the storage of the state that is given; using it afterwards raises `DonatedStateError`.

    Returns:
        A step: `(state, batch, *args) -> (state, metrics)`; `args` are passed on to the loss. The metrics are 0-d tensors:
        `loss`, what the loss function returned beside it, and the transform's info such as `lr` and `grad_norm`. A step
        leaves torch's, numpy's and Python's generators seeded by where it was: draw your own numbers from a generator.

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


def gradient_step(gradients: Gradients, transform: Transform, *, donate: bool = False) -> TrainStep:
    """Compose gradients of any origin and a transform into one step of training.

    Args:
        gradients: what `value_and_grad` or `manual_backward` makes, or a callable with their signature.
        transform: the optimizer; the same that the state is created with.
        donate: as for `train_step`.

    Returns:
        A step: `(state, batch, *args) -> (state, metrics)`; `args` are passed on to `gradients`.

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
    if not callable(gradients) or not hasattr(gradients, "binding"):
        raise ArgumentError(
            f"gradient_step needs gradients such as steps.value_and_grad(loss), not {type(gradients).__name__}; they have a "
            "`binding` (None for a plain function) and are called as (state, batch, *args, own_buffers=...)."
        )
    return TrainStep(gradients, transform, donate)


def with_gradient_callback(step: Any, fn: Callable[[Params], Transform | None]) -> Any:
    """The same step, which shows its gradients before the update.

    Args:
        step: what `train_step` or `gradient_step` made, also inside `with_full_batch`.
        fn: called with the gradients by name, without a loss scale; what it writes into them, or exchanges in the dictionary, is
            used. It may return another transform with the same state for this one update.

    Returns:
        A step.

    Raises:
        ArgumentError: the step is compiled to one graph, in which nothing can be seen, or of another kind.

    >>> import torch
    >>> from fts import steps, transforms as tx
    >>> step = steps.train_step(lambda params, batch: (params["w"] * batch).sum(), tx.sgd(0.1))
    >>> state = TrainState.create({"w": torch.tensor([1.0])}, tx.sgd(0.1))
    >>> state, _ = with_gradient_callback(step, print)(state, torch.tensor([2.0]))
    {'w': tensor([2.])}
    """
    if isinstance(step, TrainStep):
        return attrs.evolve(step, on_gradients=fn)
    if isinstance(step, WithFullBatch):
        return attrs.evolve(step, step=with_gradient_callback(step.step, fn))
    raise ArgumentError(
        f"The gradients of a {type(step).__name__} cannot be seen: only steps of train_step and gradient_step that are not "
        "compiled show them."
    )


def _shown(fn: Callable[[Params], Transform | None], grads: Params, scale: Tensor | None) -> Transform | None:
    if scale is None:
        return fn(grads)
    plain = unscaled(grads, scale)
    transform = fn(plain)
    grads.update({name: grad * scale for name, grad in plain.items()})
    return transform


def _check_transform(who: str, transform: Any) -> None:
    if not isinstance(transform, Transform):
        raise ArgumentError(
            f"{who} needs a Transform such as tx.adamw(1e-3), not {type(transform).__name__}. Make one of a torch optimizer by "
            "tx.from_torch(torch.optim.RMSprop, lr=1e-3)."
        )
    check_unscales_first(transform)
