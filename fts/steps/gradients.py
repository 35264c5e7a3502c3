"""Gradients of a loss, over one batch or several micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias, get_args

import attrs
import torch

from fts.errors import ArgumentError
from fts.state import TrainState
from fts.steps.collectives import Collectives
from fts.steps.engines import ForwardPass, GradientInputs, LossAux, func_engine, module_engine
from fts.steps.losses import ModuleLoss, check_callable
from fts.steps.microbatches import MicroBatches, PaddingBatch, split_microbatches
from fts.steps.module_binding import ModuleBinding
from fts.steps.precision import autocast_dtype, get_loss_scale
from fts.steps.tracing import any_requires_grad, is_compiling, is_tracing
from fts.typing import Batch, LossFn, Params

Engine: TypeAlias = Literal["module", "func"]

_UNSUPPORTED_BY_FUNC = ("saved tensor hooks", "requires_grad_()", "setup_context")
"""In the errors of torch.func for activation checkpointing, inputs that require gradients, and full backward hooks."""


@attrs.frozen(eq=False)
class ValueAndGrad:
    """A function `(state, batch, *args) -> (value, grads)`; made by `value_and_grad`."""

    forward: ForwardPass
    engine: Engine
    accumulate: int
    precision: str | None
    collectives: Collectives | None = None

    @property
    def binding(self) -> ModuleBinding | None:
        """The binding of the loss's module; None for a plain function."""
        return self.forward.binding

    def __call__(self, state: TrainState, batch: Batch, *args: Any, inplace_buffers: bool = False) -> tuple[LossAux, Params]:
        """Gradients at a state.

        Args:
            state: not changed, unless `inplace_buffers` is set.
            batch: a batch, which is split if `accumulate` > 1, or `MicroBatches`.
            args: passed to the loss function unsplit, for instance a teacher's parameters.
            inplace_buffers: the forward pass may write the state's non-persistent buffers in place.

        Returns:
            The value, and the gradients by parameter name. The next backward pass may reuse their storage. If the state has a
            loss scale, they are multiplied by it: `tx.dynamic_loss_scale` unscales them.
        """
        microbatches, was_split = self._split(batch)
        scale = get_loss_scale(state.opt_state, self.precision)
        inputs = GradientInputs(
            state, microbatches, args, weight_by_batch_size=was_split, collectives=self.collectives, scale=scale
        )
        if is_compiling():
            return func_engine(self.forward, inputs)
        if self.collectives is not None:
            self.collectives.check(state)
        transformed = is_tracing() or any_requires_grad(state.params)
        func = self.engine == "func" or transformed  # only torch.func can be differentiated or vmapped
        binding = self.binding
        if binding is not None:
            binding.check(state)
            if func and binding.has_gradient_hooks():
                if transformed:
                    raise ArgumentError("Parameters with gradient hooks cannot be vmapped or differentiated. Remove the hooks.")
                func = False
        with nullcontext() if binding is None or binding.module.training else binding.training_mode(training=True):
            if not func:
                return module_engine(self.forward, inputs, inplace_buffers=inplace_buffers)
            try:
                return func_engine(self.forward, inputs)
            except RuntimeError as error:
                if transformed or not any(message in str(error) for message in _UNSUPPORTED_BY_FUNC):
                    raise
                return module_engine(self.forward, inputs, inplace_buffers=inplace_buffers)  # the results are equal

    def _split(self, batch: Batch) -> tuple[Sequence[Batch], bool]:
        if isinstance(batch, MicroBatches):
            if not batch:
                raise ArgumentError("MicroBatches is empty; a step needs at least one micro-batch.")
            return batch, False
        if self.accumulate == 1:
            return (batch,), True
        if isinstance(batch, PaddingBatch):
            return [PaddingBatch(part) for part in self._split_evenly(batch.batch)], True
        return self._split_evenly(batch), True

    def _split_evenly(self, batch: Batch) -> Sequence[Batch]:
        parts = split_microbatches(batch, self.accumulate)
        if self.collectives is None or len(parts) == self.accumulate:
            return parts
        return [*parts, *[PaddingBatch(parts[-1])] * (self.accumulate - len(parts))]  # each rank runs as many forward passes


def value_and_grad(
    loss: LossFn | ModuleLoss, *, engine: Engine = "module", accumulate: int = 1, precision: str | None = None
) -> ValueAndGrad:
    """Make a function that computes a loss and its gradients at a state.

    For micro-batches i with weight w_i the loss, the gradient and every metric are sum(w_i * x_i) / sum(w_i).

    Args:
        loss: `loss(params, batch)`, or a `module_loss`.
        engine: "module" for speed, hooks and activation checkpointing, or "func" for `torch.func`. Inside a graph or a
            `torch.func` transformation, and if the parameters require gradients, it is always "func"; for what
            `torch.func` does not support (activation checkpointing, hooks) "module" runs instead.
        accumulate: the number of micro-batches of a batch, to save memory; the result is that of the full batch.
        precision: None, "bf16" or "fp16"; see `autocast_dtype`. "fp16" needs a state of `tx.dynamic_loss_scale`.

    Returns:
        `fn(state, batch, *args) -> (value, grads)`. Random numbers in micro-batch i of step k are a function of `(seed, k, i)`.

    Raises:
        ArgumentError: an argument has a value that cannot work.

    >>> import fts
    >>> from fts import transforms as tx
    >>> state = fts.TrainState.create({"w": torch.tensor([1.0, 2.0])}, tx.identity())
    >>> grad_fn = value_and_grad(lambda params, batch: (params["w"] * batch).sum())
    >>> value, grads = grad_fn(state, torch.tensor([3.0, 4.0]))
    >>> value.loss, grads["w"]
    (tensor(11.), tensor([3., 4.]))
    """
    if not isinstance(loss, ModuleLoss):
        if isinstance(loss, torch.nn.Module):
            raise ArgumentError(f"A module is not a loss. Wrap it: steps.module_loss({type(loss).__name__.lower()}, fn).")
        check_callable(loss, "value_and_grad", "loss(params, batch)")
    if engine not in get_args(Engine):
        raise ArgumentError(f"engine={engine!r} is unknown. Use 'module' or 'func'.")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ArgumentError(f"accumulate={accumulate!r} must be an integer of at least 1.")
    binding = ModuleBinding(loss.module) if isinstance(loss, ModuleLoss) else None
    return ValueAndGrad(ForwardPass(loss, autocast_dtype(precision), binding), engine, accumulate, precision)
