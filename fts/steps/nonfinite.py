"""Losses and gradients that are NaN or infinite: found before the update, and named."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from fts import transforms as tx
from fts.dtensors import any_sharded, full_tensor
from fts.errors import ArgumentError, NonFiniteError
from fts.messages import some
from fts.state import TrainState
from fts.steps.binding import Binding
from fts.steps.engines import LossAux
from fts.steps.tracing import in_transform
from fts.steps.train_step import Gradients
from fts.transforms.loss_scaling import find_loss_scale
from fts.typing import Batch, Info, Metrics, Params


class NonFinite(NamedTuple):
    """How many numbers of a tensor are not finite.

    Attributes:
        nan: how many are NaN.
        infinite: how many are infinite.
        numbers: how many there are in all.
    """

    nan: int
    infinite: int
    numbers: int

    def __str__(self) -> str:
        return f"{self.nan} NaN and {self.infinite} infinite of {self.numbers}"


def nonfinite_in(tensors: Params) -> dict[str, NonFinite]:
    """The tensors with numbers that are NaN or infinite.

    Args:
        tensors: gradients or parameters by name.

    Returns:
        How many, by name; empty where all are finite. It waits for the device, and where tensors are spread over processes all
        must call it.

    >>> nonfinite_in({"w": torch.tensor([1.0, float("nan")]), "b": torch.zeros(1)})
    {'w': NonFinite(nan=1, infinite=0, numbers=2)}
    """
    if not tensors or _norm_is_finite(list(tensors.values())):
        return {}
    found = {name: NonFinite(_count(t.isnan()), _count(t.isinf()), t.numel()) for name, t in tensors.items()}
    return {name: counts for name, counts in found.items() if counts.nan or counts.infinite}


def _norm_is_finite(tensors: list[Tensor]) -> bool:
    """A finite norm proves finite numbers, and is read once for all; an infinite one may be an overflow of squares."""
    if any_sharded(tensors):
        return math.isfinite(float(tx.global_norm(tensors)))
    norms = torch._foreach_norm(tensors)
    if all(norm.is_cpu for norm in norms):
        return math.isfinite(sum(map(float, norms)))
    device = norms[0].device
    return math.isfinite(float(torch.stack([norm.detach().to(device, torch.float32) for norm in norms]).sum()))


def _count(flags: Tensor) -> int:
    return int(full_tensor(flags.sum()))


@attrs.frozen(eq=False)
class FiniteGradients:
    """Gradients that are looked at before anybody uses them; made by `raise_if_nonfinite`."""

    gradients: Gradients

    @property
    def binding(self) -> Binding | None:
        """That of the gradients."""
        return self.gradients.binding

    def __call__(self, state: TrainState, batch: Batch, *args: Any, own_buffers: bool = False) -> tuple[LossAux, Params]:
        if in_transform():
            raise ArgumentError(IN_GRAPH)
        # not in the state's own buffers: a batch that gives NaN must not leave it in them
        value, grads = self.gradients(state, batch, *args)
        # where the loss is scaled, gradients may overflow: that update is skipped, and the scale falls
        found = nonfinite_in(grads) if find_loss_scale(state.opt_state) is None else {}
        loss = float(value.loss)
        if found or not math.isfinite(loss):
            raise NonFiniteError(describe_nonfinite(int(state.step) + 1, loss, found, len(grads)))
        return value, grads


def describe_nonfinite(step: int, loss: float, found: dict[str, NonFinite], parameters: int) -> str:
    """Say what is not finite in a step.

    Args:
        step: the number of the step, the first being 1.
        loss: its loss.
        found: what `nonfinite_in` found in its gradients.
        parameters: how many there are.

    >>> print(describe_nonfinite(3, math.inf, {}, 2))
    In step 3 the loss is inf; all gradients are finite. Nothing was updated...
    """
    names = some([f"{name} ({counts})" for name, counts in found.items()])
    which = f"the gradients of {len(found)} of {parameters} parameters are not finite: {names}"
    return (
        f"In step {step} the loss is {loss:g}; {which if found else 'all gradients are finite'}. Nothing was updated: the state "
        "is that before the step. Look for log(0), 0/0 (a mean over labels of which none counts) or overflow in the loss and for "
        "bad numbers in the batch, lower the learning rate, or skip such updates with tx.skip_nonfinite."
    )


IN_GRAPH = (
    "A graph cannot look at its gradients while it runs. Wrap the optimizer in tx.skip_nonfinite(optimizer, limit=1) instead, "
    "which withholds the update and raises; loops.replay names the parameters."
)


def raise_if_nonfinite(gradients: Gradients) -> FiniteGradients:
    """Raise where a loss or gradient is NaN or infinite, before the update.

    It reads one number at each step, which on devices other than the CPU waits for them.

    Args:
        gradients: what `value_and_grad` or `manual_backward` makes.

    Returns:
        The same, for `gradient_step`. A `NonFiniteError` names the step, the loss and the parameters; the state stays as it was,
        also one that was to be donated. Where the state has a loss scale, only the loss is looked at: gradients may overflow
        by it.

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
    if not callable(gradients) or not hasattr(gradients, "binding"):
        raise ArgumentError(
            f"raise_if_nonfinite needs gradients such as steps.value_and_grad(loss), not {type(gradients).__name__}."
        )
    return FiniteGradients(gradients)


@attrs.frozen(eq=False)
class CheckedStep:
    """A step whose figures are looked at after it; made by `check_after_step`."""

    step: Any
    at_once: bool = False

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        after, metrics = self.step(state, batch, *args)
        if self.at_once or all(value.is_cpu for value in metrics.values() if isinstance(value, Tensor)):
            _look_at(metrics)
        return after, metrics

    def check(self, info: Info) -> None:
        """As the step's own `check`, if it has one; then raise where the loss or the norm of the gradients is not finite."""
        check = getattr(self.step, "check", None)
        if check is not None:
            check(info)
        _look_at(info)


def _look_at(metrics: Metrics) -> None:
    scaled = "loss_scale" in metrics  # gradients may overflow by it, and their update is skipped
    names = ("loss",) if scaled else ("loss", "grad_norm")
    found = {name: float(metrics[name]) for name in names if name in metrics and metrics[name].ndim == 0}
    if all(map(math.isfinite, found.values())) or (not scaled and int(metrics.get("skipped", 0))):
        return
    raise NonFiniteError(
        f"{' and '.join(f'{name} = {value:g}' for name, value in found.items())} after an update, which is in the parameters "
        "now. Go on from the last checkpoint; withhold such updates with tx.skip_nonfinite, or run the step uncompiled to see "
        "which gradients they are."
    )


def check_after_step(step: Any, *, at_once: bool = False) -> CheckedStep:
    """Raise where the loss or the norm of the gradients of a step is NaN or infinite, after its update.

    It works for steps whose gradients cannot be looked at before (compiled, or your own) and waits for no device: off the CPU the
    figures are looked at when the loop reads them.

    Args:
        step: `(state, batch) -> (state, metrics)` with a metric `loss`, `grad_norm`, or both.
        at_once: look after each step, also where that waits for a device.

    Returns:
        A step that raises `NonFiniteError`. A metric `skipped` that is not 0 says that the update was withheld. Where there is a
        metric `loss_scale`, only the loss is looked at: gradients may overflow by it.

    >>> careful = check_after_step(lambda state, batch: (state, {"loss": batch}))
    >>> careful(None, torch.tensor(float("nan")))
    Traceback (most recent call last):
    fts.errors.NonFiniteError: loss = nan after an update, which is in the parameters now. Go on from the last checkpoint...
    """
    return CheckedStep(step, at_once)
