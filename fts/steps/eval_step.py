"""One step of evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from fts.randomness import EVALUATION, fold, seed_generators
from fts.state import TrainState
from fts.steps.binding import Binding
from fts.steps.engines import Forward
from fts.steps.losses import ModuleLoss, check_callable
from fts.steps.precision import autocast_dtype
from fts.steps.tracing import device_of
from fts.steps.weighted_mean import weight_of
from fts.typing import Batch, LossFn, LossOutput, Number

Means: TypeAlias = dict[str, tuple[Tensor, Number]]
"""Metrics by name as (mean, weight), so that any number of batches add up to the figure of the whole set."""


@attrs.frozen(eq=False)
class EvalStep:
    """A function `(state, batch, *args) -> {name: (mean, weight)}`; made by `eval_step`."""

    forward: Forward
    precision: str | None

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> Means:
        device = device_of(state.params)
        # what is random in an evaluation depends on the step alone, and differs from what training drew there
        seed_generators(fold(state.seed, EVALUATION, int(state.step)), device)
        with torch.no_grad(), _evaluating(self.forward.binding, state):
            output = self.forward(state.params, batch, args, device)
        weight = weight_of(output, batch, weigh_rows=True)
        return {"loss": (output.loss, weight), **_weighted(output, weight)}


def eval_step(loss: LossFn | ModuleLoss, *, precision: str | None = None) -> EvalStep:
    """A step that evaluates a loss, and the metrics that it returns, without changing the state.

    Args:
        loss: `loss(params, batch)` or a `module_loss`, which runs in eval mode.
        precision: None, "bf16" or "fp16".

    Returns:
        `fn(state, batch) -> {name: (mean, weight)}`, with "loss" among the names; the weight is the loss function's,
        or the rows of the batch. `fts.loops.evaluation` adds them up over a data set.

    >>> from fts import transforms as tx
    >>> state = TrainState.create({"w": torch.tensor([1.0])}, tx.identity())
    >>> eval_step(lambda params, batch: (params["w"] - batch).square().mean())(state, torch.tensor([1.0, 3.0]))
    {'loss': (tensor(2.), 2)}
    """
    if not isinstance(loss, ModuleLoss):
        check_callable(loss, "eval_step", "loss(params, batch)")
    binding = Binding(loss.module) if isinstance(loss, ModuleLoss) else None
    return EvalStep(Forward(loss, autocast_dtype(precision), binding), precision)


@contextmanager
def eval_module(module: nn.Module, state: TrainState) -> Iterator[nn.Module]:
    """Run a module at a state's tensors, in eval mode, until the block ends; afterwards the module is as it was.

    Args:
        module: the one that the state was created from.
        state: is not changed, whatever the module does to its buffers.

    Raises:
        UnknownParameterError: the state's names are not those of the module.

    >>> from fts import transforms as tx
    >>> net = nn.Linear(1, 1, bias=False)
    >>> state = TrainState.create(net, tx.identity()).replace(params={"weight": torch.tensor([[3.0]])})
    >>> with torch.no_grad(), eval_module(net, state) as model:
    ...     model(torch.tensor([2.0]))
    tensor([6.])
    """
    with _evaluating(Binding(module), state):
        yield module


@contextmanager
def _evaluating(binding: Binding | None, state: TrainState) -> Iterator[None]:
    if binding is None:
        yield
        return
    binding.check(state)
    buffers = {name: tensor.clone() for name, tensor in state.buffers.items()}
    with binding.mode(training=False), binding.lend(state.params, state.frozen, buffers):
        yield


def _weighted(output: LossOutput, weight: Number) -> Means:
    means: Means = {}
    for name, value in output.metrics.items():
        mean, own = value if isinstance(value, tuple) else (value, weight)
        means[name] = (torch.as_tensor(mean), own)
    return means
