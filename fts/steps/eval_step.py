"""Evaluation steps, and a module at the tensors of a state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from fts.randomness import EVALUATION, fold_in, seed_generators
from fts.state import TrainState
from fts.steps.engines import ForwardPass
from fts.steps.losses import ModuleLoss, check_callable
from fts.steps.module_binding import ModuleBinding
from fts.steps.precision import autocast_dtype
from fts.steps.tracing import device_of
from fts.steps.weighted_mean import microbatch_weight
from fts.typing import Batch, LossFn, LossOutput, Number

WeightedMetrics: TypeAlias = dict[str, tuple[Tensor, Number]]
"""Metrics by name as (mean, weight), so that those of any number of batches combine to the mean over the data set."""


@attrs.frozen(eq=False)
class EvalStep:
    """A function `(state, batch, *args) -> {name: (mean, weight)}`; made by `eval_step`."""

    forward: ForwardPass
    precision: str | None

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> WeightedMetrics:
        device = device_of(state.params)
        # random numbers of an evaluation depend on the step alone, and are not those of its training step
        seed_generators(fold_in(state.seed, EVALUATION, int(state.step)), device)
        with torch.no_grad(), _evaluating(self.forward.binding, state):
            output = self.forward(state.params, batch, args, device)
        weight = microbatch_weight(output, batch, weight_by_batch_size=True)
        return {"loss": (output.loss, weight), **_weighted_metrics(output, weight)}


def eval_step(loss: LossFn | ModuleLoss, *, precision: str | None = None) -> EvalStep:
    """A step that evaluates a loss, and the metrics that it returns, without changing the state.

    Args:
        loss: `loss(params, batch)` or a `module_loss`, which runs in eval mode.
        precision: None, "bf16" or "fp16".

    Returns:
        `fn(state, batch) -> {name: (mean, weight)}`, with "loss" as one of the names; the weight is the loss function's,
        or the batch size. `fts.loops.evaluation` combines them over a data set.

    >>> from fts import transforms as tx
    >>> state = TrainState.create({"w": torch.tensor([1.0])}, tx.identity())
    >>> eval_step(lambda params, batch: (params["w"] - batch).square().mean())(state, torch.tensor([1.0, 3.0]))
    {'loss': (tensor(2.), 2)}
    """
    if not isinstance(loss, ModuleLoss):
        check_callable(loss, "eval_step", "loss(params, batch)")
    binding = ModuleBinding(loss.module) if isinstance(loss, ModuleLoss) else None
    return EvalStep(ForwardPass(loss, autocast_dtype(precision), binding), precision)


@contextmanager
def eval_module(module: nn.Module, state: TrainState) -> Iterator[nn.Module]:
    """Run a module with a state's tensors, in eval mode, until the block ends; then restore the module.

    Args:
        module: that the state was created from.
        state: not changed, even if the module writes its buffers.

    Raises:
        UnknownParameterError: the state's names are not those of the module.

    >>> from fts import transforms as tx
    >>> net = nn.Linear(1, 1, bias=False)
    >>> state = TrainState.create(net, tx.identity()).replace(params={"weight": torch.tensor([[3.0]])})
    >>> with torch.no_grad(), eval_module(net, state) as model:
    ...     model(torch.tensor([2.0]))
    tensor([6.])
    """
    with _evaluating(ModuleBinding(module), state):
        yield module


@contextmanager
def _evaluating(binding: ModuleBinding | None, state: TrainState) -> Iterator[None]:
    if binding is None:
        yield
        return
    binding.check(state)
    buffers = {name: tensor.clone() for name, tensor in state.buffers.items()}
    with binding.training_mode(training=False), binding.swap_parameters(state.params, state.frozen, buffers):
        yield


def _weighted_metrics(output: LossOutput, weight: Number) -> WeightedMetrics:
    means: WeightedMetrics = {}
    for name, value in output.metrics.items():
        mean, own = value if isinstance(value, tuple) else (value, weight)
        means[name] = (torch.as_tensor(mean), own)
    return means
