"""A step that DeepSpeed's engine takes: its backward pass, its gradient reduction, its optimizer."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from fts.distributed.process_group import Group
from fts.errors import ArgumentError, LossError, MissingDependencyError
from fts.randomness import seed_microbatch
from fts.state import TrainState
from fts.steps import MicroBatches, ModuleLoss, PaddingBatch
from fts.steps.losses import call_loss
from fts.steps.precision import autocast
from fts.steps.weighted_mean import all_reduce_weighted_mean, microbatch_weight
from fts.typing import Batch, LossOutput, Metrics, Number, Params, Transform


@attrs.frozen(eq=False)
class DeepSpeedStep:
    """A step `(state, batch, *args) -> (state, metrics)` that DeepSpeed's engine takes on all ranks.

    The gradient is `sum(w * g) / sum(w)` over the micro-batches of all ranks, as elsewhere. The engine needs `sum(w)` before its
    first backward pass, so where a rank has several micro-batches they must have equal weights.

    Attributes:
        loss: of a module, whose parameters the engine manages.
        transform: a placeholder for the engine's optimizer: see `placeholder_transform`.
        group: the processes.
        engine: from `initialize`; None for a step that is only described.
        dtype: of autocast for the loss; None for that of the parameters.
        stage: of ZeRO, for `describe`.
    """

    loss: ModuleLoss
    transform: Transform
    group: Group
    engine: Any = None
    dtype: torch.dtype | None = None
    stage: int = 0

    @property
    def __name__(self) -> str:
        return f"DeepSpeed's engine, ZeRO stage {self.stage}: {self.transform.label}; loss: {self.loss.label}"

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        engine, group = self.engine, self.group
        if engine is None:
            raise ArgumentError("This step of DeepSpeed has no engine: it can only be described. Trainer.train starts one.")
        micro_batches: Sequence[Batch] = batch if isinstance(batch, MicroBatches) else (batch,)
        device, module = group.device, self.loss.module
        num_real = sum(not isinstance(micro_batch, PaddingBatch) for micro_batch in micro_batches)
        num_batches = None if len(micro_batches) == 1 else group.all_reduce(torch.tensor(float(num_real), device=device))
        outputs: list[LossOutput] = []
        for index, micro_batch in enumerate(micro_batches):
            seed_microbatch(state.seed, int(state.step), index * group.size + group.rank, device)
            engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            output = self._forward(micro_batch, args)
            weight = cast(Number, output.weight)
            if num_batches is None:
                total_weight = group.all_reduce(torch.as_tensor(weight, dtype=torch.float32, device=device))
            else:
                total_weight = num_batches
                if not isinstance(micro_batch, PaddingBatch) and weight != 1:
                    raise LossError(
                        f"Under DeepSpeed the micro-batches of an update must have equal weights, but one has {weight}. Return "
                        "the loss without a weight, or do not accumulate gradients."
                    )
            # the engine averages gradients over ranks
            engine.backward(output.loss * (weight * group.size / total_weight), scale_wrt_gas=False)
            outputs.append(output._replace(loss=output.loss.detach()))
        found = all_reduce_weighted_mean(outputs, cast(Any, group), device)
        rate, own_norm = engine.optimizer.param_groups[0]["lr"], _grad_norm(module) if self.stage == 0 else None
        engine.step()
        norm = engine.get_global_grad_norm()
        metrics = {
            "loss": found.loss,
            **found.metrics,
            "grad_norm": torch.as_tensor(own_norm if norm is None else norm, device=device),
            "lr": torch.tensor(float(rate)),
        }
        if not engine.was_step_applied():
            metrics["skipped"] = torch.ones((), dtype=torch.int64)
        return self._next_state(state, module), metrics

    def _forward(self, micro_batch: Batch, args: Sequence[Any]) -> LossOutput:
        batch = micro_batch.batch if isinstance(micro_batch, PaddingBatch) else micro_batch
        loss_module = self.engine.module
        loss_module.compute = lambda: self._loss(batch, args)
        self.engine()
        output = cast(LossOutput, loss_module.output)
        loss_module.output = loss_module.compute = None
        if isinstance(micro_batch, PaddingBatch):
            means = {name: value[0] if isinstance(value, tuple) else value for name, value in output.metrics.items()}
            return output._replace(weight=0, metrics={name: (mean, 0) for name, mean in means.items()})
        return output._replace(weight=microbatch_weight(output, batch, weight_by_batch_size=False))

    def _loss(self, batch: Batch, args: Sequence[Any]) -> LossOutput:
        with autocast(self.group.device, self.dtype):
            return call_loss(self.loss, None, batch, *args)

    def _next_state(self, state: TrainState, module: nn.Module) -> TrainState:
        buffers = {name: tensor.detach() for name, tensor in module.named_buffers() if name in state.buffers}
        self.group.broadcast_([tensor for name, tensor in buffers.items() if name not in state.metadata.non_persistent])
        return state.replace(params=_detached_params(module, state.params), buffers=buffers, step=state.step + 1)


class _LossModule(nn.Module):
    """The engine's model: its forward pass is the loss, with all calls of the given module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.compute: Callable[[], LossOutput] | None = None
        self.output: LossOutput | None = None

    def forward(self) -> Tensor:
        assert self.compute is not None
        self.output = self.compute()
        return self.output.loss


def initialize(
    module: nn.Module,
    config: Mapping[str, Any],
    device: torch.device,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    groups: Iterable[Mapping[str, Any]] | None = None,
) -> Any:
    """DeepSpeed's engine around a module, for torch's default process group.

    Args:
        module: the engine updates its parameters in place; at stage 3 each rank keeps a shard of each.
        config: DeepSpeed's, without "auto".
        device: where it computes.
        optimizer: of the module's parameters; None where the configuration names one.
        groups: the parameter groups of the optimizer that the configuration names.

    Returns:
        The engine. Its `module` wraps the given one.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
    check_installed()
    import deepspeed

    config = {"steps_per_print": float("inf"), **copy.deepcopy(dict(config))}
    if optimizer is not None:  # it is not in DeepSpeed's list of tested optimizers
        config = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **config}
    engine, *_ = deepspeed.initialize(model=_LossModule(module), optimizer=optimizer, model_parameters=groups, config=config)
    return engine


NOT_INSTALLED = (
    "deepspeed= needs the package deepspeed, which is not installed: pip install deepspeed, or use fsdp='full_shard', which "
    "shards what ZeRO's stage 3 does."
)


def check_installed() -> None:
    """Raise MissingDependencyError if DeepSpeed is not installed, without importing it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError(NOT_INSTALLED)


def placeholder_transform(label: str) -> Transform:
    """A Transform in the place of DeepSpeed's optimizer: it has no state, and its update raises.

    Args:
        label: of that optimizer.

    >>> placeholder_transform("DeepSpeed's own AdamW").init({})
    ()
    """

    def update(grads: Params, state: Any, params: Params | None) -> Any:
        raise ArgumentError(f"Under DeepSpeed no transform updates the weights, but {label}.")

    return Transform(lambda params: (), update, label=label)


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO's stage 3 has partitioned the parameters of a module, so that each is empty while it is not gathered.

    >>> is_partitioned(nn.Linear(1, 1))
    False
    """
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def has_flat_buffers(module: nn.Module) -> bool:
    """Whether parameters are views of larger buffers, as under ZeRO, so that they must be copied before they are saved.

    >>> has_flat_buffers(nn.Linear(1, 1))
    False
    """
    return is_partitioned(module) or any(p.untyped_storage().nbytes() > p.nbytes for p in module.parameters() if p.nbytes)


def gathered_parameters(parameters: Iterable[Tensor], *, write: bool = False) -> AbstractContextManager[Any]:
    """A block in which the parameters that ZeRO's stage 3 has partitioned are gathered on all ranks; collective.

    Args:
        parameters: those that are not partitioned stay as they are.
        write: whether to broadcast, at the end, what the main process has written into them.

    >>> with gathered_parameters(nn.Linear(1, 1).parameters()):
    ...     pass
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return cast(AbstractContextManager[Any], deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None))


def _detached_params(module: nn.Module, params: Params) -> Params:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if name in params}


def _grad_norm(module: nn.Module) -> Tensor | None:
    """The norm of the averaged gradients, which the engine does not report for a plain optimizer."""
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(grads) if grads else None
