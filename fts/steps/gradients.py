"""From a loss to gradients, over one batch or several micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias, get_args

import attrs
import torch

from fts.errors import ArgumentError
from fts.state import TrainState
from fts.steps.binding import Binding
from fts.steps.collectives import Collectives
from fts.steps.engines import Forward, LossAux, Work, func_engine, module_engine
from fts.steps.losses import ModuleLoss, check_callable
from fts.steps.microbatches import MicroBatches, PaddingBatch, split_microbatches
from fts.steps.precision import autocast_dtype, scale_of
from fts.steps.tracing import differentiated, in_graph, in_transform
from fts.typing import Batch, LossFn, Params

Engine: TypeAlias = Literal["module", "func"]

_REFUSALS = ("saved tensor hooks", "requires_grad_()", "setup_context")
"""What torch.func says of activation checkpoints, of inputs that require gradients, and of full backward hooks."""


@attrs.frozen(eq=False)
class ValueAndGrad:
    """A function `(state, batch, *args) -> (value, grads)`; made by `value_and_grad`."""

    forward: Forward
    engine: Engine
    accumulate: int
    precision: str | None
    among: Collectives | None = None

    @property
    def binding(self) -> Binding | None:
        """Where the tensors of the loss's module live; None for a plain function."""
        return self.forward.binding

    def __call__(self, state: TrainState, batch: Batch, *args: Any, own_buffers: bool = False) -> tuple[LossAux, Params]:
        """Gradients at a state.

        Args:
            state: read, never written, unless `own_buffers` is set.
            batch: a batch, which is cut where `accumulate` > 1, or `MicroBatches`.
            args: passed on to the loss function whole, for instance a teacher's parameters.
            own_buffers: the forward pass may write the state's non-persistent buffers in place.

        Returns:
            The value, and the gradients by parameter name. The next backward pass may reuse their storage. Where the state has a
            loss scale, the gradients are multiplied by it: `tx.dynamic_loss_scale` divides them.
        """
        micro, cut_here = self._cut(batch)
        scale = scale_of(state.opt_state, self.precision)
        work = Work(state, micro, args, weigh_rows=cut_here, among=self.among, scale=scale)
        if in_graph():
            return func_engine(self.forward, work)
        if self.among is not None:
            self.among.check(state)
        outside = in_transform() or differentiated(state.params)
        func = self.engine == "func" or outside  # only torch.func can be differentiated or vmapped from outside
        binding = self.binding
        if binding is not None:
            binding.check(state)
            if func and binding.has_hooks():
                if outside:
                    raise ArgumentError("Parameters with gradient hooks cannot be vmapped or differentiated. Remove the hooks.")
                func = False
        with nullcontext() if binding is None or binding.module.training else binding.mode(training=True):
            if not func:
                return module_engine(self.forward, work, own_buffers=own_buffers)
            try:
                return func_engine(self.forward, work)
            except RuntimeError as error:
                if outside or not any(refusal in str(error) for refusal in _REFUSALS):
                    raise
                return module_engine(self.forward, work, own_buffers=own_buffers)  # which means the same

    def _cut(self, batch: Batch) -> tuple[Sequence[Batch], bool]:
        if isinstance(batch, MicroBatches):
            if not batch:
                raise ArgumentError("MicroBatches is empty; a step needs at least one micro-batch.")
            return batch, False
        if self.accumulate == 1:
            return (batch,), True
        if isinstance(batch, PaddingBatch):
            return [PaddingBatch(part) for part in self._parts(batch.batch)], True
        return self._parts(batch), True

    def _parts(self, batch: Batch) -> Sequence[Batch]:
        parts = split_microbatches(batch, self.accumulate)
        if self.among is None or len(parts) == self.accumulate:
            return parts
        return [*parts, *[PaddingBatch(parts[-1])] * (self.accumulate - len(parts))]  # each process takes as many forward passes


def value_and_grad(
    loss: LossFn | ModuleLoss, *, engine: Engine = "module", accumulate: int = 1, precision: str | None = None
) -> ValueAndGrad:
    """A function that computes a loss and its gradients at a state.

    For micro-batches i with weight w_i the loss, the gradient and every metric are sum(w_i * x_i) / sum(w_i).

    Args:
        loss: `loss(params, batch)`, or a `module_loss`.
        engine: "module" for speed, hooks and activation checkpointing, or "func" for `torch.func`. Inside a graph or a
            `torch.func` transformation, and where the parameters are differentiated from outside, it is always "func";
            what `torch.func` cannot do (activation checkpoints, hooks) "module" does for it.
        accumulate: into how many micro-batches to cut each batch, to save memory; the result is that of the whole batch.
        precision: None, "bf16" or "fp16"; see `autocast_dtype`. "fp16" needs a state of `tx.dynamic_loss_scale`.

    Returns:
        `fn(state, batch, *args) -> (value, grads)`. Randomness in micro-batch i of step k is a function of `(seed, k, i)`.

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
    binding = Binding(loss.module) if isinstance(loss, ModuleLoss) else None
    return ValueAndGrad(Forward(loss, autocast_dtype(precision), binding), engine, accumulate, precision)
