"""Checks for losses and gradients that are NaN or infinite, before or after the update."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from fts import transforms as tx
from fts.dtensors import any_dtensor, full_tensor
from fts.errors import ArgumentError, NonFiniteError
from fts.messages import abbreviate
from fts.state import TrainState
from fts.steps.engines import LossAux
from fts.steps.module_binding import ModuleBinding
from fts.steps.tracing import is_tracing
from fts.steps.train_step import GradientFn
from fts.transforms.loss_scaling import find_loss_scale
from fts.typing import Batch, Info, Metrics, Params


class NonFiniteCounts(NamedTuple):
    """How many elements of a tensor are not finite.

    Attributes:
        nan: how many are NaN.
        infinite: how many are infinite.
        numel: how many there are in all.
    """

    nan: int
    infinite: int
    numel: int

    def __str__(self) -> str:
        return f"{self.nan} NaN and {self.infinite} infinite of {self.numel}"


def find_nonfinite(tensors: Params) -> dict[str, NonFiniteCounts]:
    """Find the tensors with elements that are NaN or infinite.

    Args:
        tensors: gradients or parameters by name.

    Returns:
        Counts by name; empty if all are finite. It synchronizes with the device. If the tensors are sharded, all ranks must
        call it.

    >>> find_nonfinite({"w": torch.tensor([1.0, float("nan")]), "b": torch.zeros(1)})
    {'w': NonFiniteCounts(nan=1, infinite=0, numel=2)}
    """
    if not tensors or _norm_is_finite(list(tensors.values())):
        return {}
    found = {name: NonFiniteCounts(_count(t.isnan()), _count(t.isinf()), t.numel()) for name, t in tensors.items()}
    return {name: counts for name, counts in found.items() if counts.nan or counts.infinite}


def _norm_is_finite(tensors: list[Tensor]) -> bool:
    """A finite norm proves finite elements, with one synchronization; an infinite one may be an overflow of squares."""
    if any_dtensor(tensors):
        return math.isfinite(float(tx.global_norm(tensors)))
    norms = torch._foreach_norm(tensors)
    if all(norm.is_cpu for norm in norms):
        return math.isfinite(sum(map(float, norms)))
    device = norms[0].device
    return math.isfinite(float(torch.stack([norm.detach().to(device, torch.float32) for norm in norms]).sum()))


def _count(flags: Tensor) -> int:
    return int(full_tensor(flags.sum()))


@attrs.frozen(eq=False)
class CheckedGradients:
    """A gradient function that checks its results; made by `raise_if_nonfinite`."""

    gradient_fn: GradientFn

    @property
    def binding(self) -> ModuleBinding | None:
        """The binding of the gradient function."""
        return self.gradient_fn.binding

    def __call__(self, state: TrainState, batch: Batch, *args: Any, inplace_buffers: bool = False) -> tuple[LossAux, Params]:
        if is_tracing():
            raise ArgumentError(CHECK_IN_GRAPH)
        # without in-place writes: a batch that gives NaN must not leave it in the state's buffers
        value, grads = self.gradient_fn(state, batch, *args)
        # with a loss scale, gradients may overflow: that update is skipped, and the scale is lowered
        found = find_nonfinite(grads) if find_loss_scale(state.opt_state) is None else {}
        loss = float(value.loss)
        if found or not math.isfinite(loss):
            raise NonFiniteError(nonfinite_message(int(state.step) + 1, loss, found, len(grads)))
        return value, grads


def nonfinite_message(step: int, loss: float, found: dict[str, NonFiniteCounts], num_parameters: int) -> str:
    """The message about a step that is not finite.

    Args:
        step: from 1.
        loss: of the step.
        found: by `find_nonfinite`, in the gradients.
        num_parameters: the number of gradients.

    >>> print(nonfinite_message(3, math.inf, {}, 2))
    In step 3 the loss is inf; all gradients are finite. Nothing was updated...
    """
    names = abbreviate([f"{name} ({counts})" for name, counts in found.items()])
    which = f"the gradients of {len(found)} of {num_parameters} parameters are not finite: {names}"
    return (
        f"In step {step} the loss is {loss:g}; {which if found else 'all gradients are finite'}. Nothing was updated: the state "
        "is that before the step. Look for log(0), 0/0 (a mean over labels of which none counts) or overflow in the loss and for "
        "bad values in the batch, lower the learning rate, or skip such updates with tx.skip_nonfinite."
    )


CHECK_IN_GRAPH = (
    "A graph cannot check its gradients while it runs. Wrap the optimizer in tx.skip_nonfinite(optimizer, limit=1) instead, "
    "which skips the update and raises; loops.replay names the parameters."
)


def raise_if_nonfinite(gradient_fn: GradientFn) -> CheckedGradients:
    """Raise before the update if the loss or a gradient is NaN or infinite.

    It reads one number at each step, which synchronizes with the device.

    Args:
        gradient_fn: from `value_and_grad` or `manual_backward`.

    Returns:
        A gradient function for `gradient_step`. Its `NonFiniteError` names the step, the loss and the parameters; the state stays
        as it was, also one that was to be donated. If the state has a loss scale, only the loss is checked: the scale may
        make gradients overflow.

    Raises:
        ArgumentError: it is used in a graph or a `torch.func` transformation.

    >>> import fts
    >>> from fts import steps, transforms as tx
    >>> state = fts.TrainState.create({"w": torch.tensor([0.0])}, tx.sgd(0.1))
    >>> gradients = raise_if_nonfinite(steps.value_and_grad(lambda params, batch: (params["w"] * batch).log().sum()))
    >>> steps.gradient_step(gradients, tx.sgd(0.1))(state, torch.tensor([1.0]))
    Traceback (most recent call last):
    fts.errors.NonFiniteError: In step 1 the loss is -inf; the gradients of 1 of 1 parameters are not finite: w (0 NaN...
    """
    if not callable(gradient_fn) or not hasattr(gradient_fn, "binding"):
        raise ArgumentError(
            f"raise_if_nonfinite needs a gradient function such as steps.value_and_grad(loss), not {type(gradient_fn).__name__}."
        )
    return CheckedGradients(gradient_fn)


@attrs.frozen(eq=False)
class CheckedStep:
    """A step whose metrics are checked after it; made by `check_after_step`."""

    step: Any
    blocking: bool = False

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        after, metrics = self.step(state, batch, *args)
        if self.blocking or all(value.is_cpu for value in metrics.values() if isinstance(value, Tensor)):
            _check_metrics(metrics)
        return after, metrics

    def check(self, info: Info) -> None:
        """Call the `check` of the step, if it has one; then raise if the loss or the gradient norm is not finite."""
        check = getattr(self.step, "check", None)
        if check is not None:
            check(info)
        _check_metrics(info)


def _check_metrics(metrics: Metrics) -> None:
    scaled = "loss_scale" in metrics  # it may make gradients overflow, and their update is skipped
    names = ("loss",) if scaled else ("loss", "grad_norm")
    found = {name: float(metrics[name]) for name in names if name in metrics and metrics[name].ndim == 0}
    if all(map(math.isfinite, found.values())) or (not scaled and int(metrics.get("skipped", 0))):
        return
    raise NonFiniteError(
        f"{' and '.join(f'{name} = {value:g}' for name, value in found.items())} after an update, which is in the parameters "
        "now. Resume from the last checkpoint; skip such updates with tx.skip_nonfinite, or run the step uncompiled to see "
        "which gradients they are."
    )


def check_after_step(step: Any, *, blocking: bool = False) -> CheckedStep:
    """Raise after the update if the loss or the gradient norm of a step is NaN or infinite.

    It is for steps whose gradients cannot be checked before (compiled, or your own) and does not synchronize with a device:
    metrics that are not on the CPU are checked when the loop reads them.

    Args:
        step: `(state, batch) -> (state, metrics)` with a metric `loss`, `grad_norm`, or both.
        blocking: check after each step, also if that synchronizes with a device.

    Returns:
        A step that raises `NonFiniteError`. A metric `skipped` other than 0 means that the update was skipped. If there is a
        metric `loss_scale`, only the loss is checked: the scale may make gradients overflow.

    >>> careful = check_after_step(lambda state, batch: (state, {"loss": batch}))
    >>> careful(None, torch.tensor(float("nan")))
    Traceback (most recent call last):
    fts.errors.NonFiniteError: loss = nan after an update, which is in the parameters now. Resume from the last checkpoint...
    """
    return CheckedStep(step, blocking)
