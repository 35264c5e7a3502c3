"""A step that DeepSpeed's engine takes: its backward pass, its exchange of gradients, its optimizer."""

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
from fts.randomness import STEP, fold, seed_generators
from fts.state import TrainState
from fts.steps import MicroBatches, ModuleLoss, PaddingBatch
from fts.steps.losses import call_loss
from fts.steps.precision import autocast
from fts.steps.weighted_mean import total_among, weight_of
from fts.typing import Batch, LossOutput, Metrics, Number, Params, Transform


@attrs.frozen(eq=False)
class DeepSpeedStep:
    """A step `(state, batch, *args) -> (state, metrics)` that DeepSpeed's engine takes in all processes.

    The gradient is `sum(w * g) / sum(w)` over the micro-batches of all processes, as elsewhere. The engine needs `sum(w)` before
    its first backward pass, so where a process has several micro-batches they must all weigh the same.

    Attributes:
        loss: of a module, whose parameters the engine has.
        transform: stands for the engine's optimizer: see `inert`.
        group: the processes.
        engine: what `initialize` made; None for a step that is only described.
        dtype: in which the loss is computed under autocast; None for that of the parameters.
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
            raise ArgumentError("This step of DeepSpeed has no engine: it is there to be described. Trainer.train starts one.")
        micro: Sequence[Batch] = batch if isinstance(batch, MicroBatches) else (batch,)
        device, module = group.device, self.loss.module
        real = sum(not isinstance(part, PaddingBatch) for part in micro)
        total = None if len(micro) == 1 else group.sum(torch.tensor(float(real), device=device))
        outputs: list[LossOutput] = []
        for index, part in enumerate(micro):
            seed_generators(fold(state.seed, STEP, int(state.step), index * group.size + group.rank), device)
            engine.set_gradient_accumulation_boundary(index == len(micro) - 1)
            output = self._output(part, args)
            weight = cast(Number, output.weight)
            if total is None:
                of_all = group.sum(torch.as_tensor(weight, dtype=torch.float32, device=device))
            else:
                of_all = total
                if not isinstance(part, PaddingBatch) and weight != 1:
                    raise LossError(
                        f"Under DeepSpeed the micro-batches of an update must weigh the same, but one has the weight {weight}. "
                        "Return the loss without a weight, or accumulate nothing."
                    )
            # what the engine exchanges is the mean over the processes
            engine.backward(output.loss * (weight * group.size / of_all), scale_wrt_gas=False)
            outputs.append(output._replace(loss=output.loss.detach()))
        found = total_among(outputs, cast(Any, group), device)
        rate, own_norm = engine.optimizer.param_groups[0]["lr"], _norm(module) if self.stage == 0 else None
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
        return self._after(state, module), metrics

    def _output(self, part: Batch, args: Sequence[Any]) -> LossOutput:
        batch = part.batch if isinstance(part, PaddingBatch) else part
        root = self.engine.module
        root.run = lambda: self._loss(batch, args)
        self.engine()
        output = cast(LossOutput, root.output)
        root.output = root.run = None
        if isinstance(part, PaddingBatch):
            means = {name: value[0] if isinstance(value, tuple) else value for name, value in output.metrics.items()}
            return output._replace(weight=0, metrics={name: (mean, 0) for name, mean in means.items()})
        return output._replace(weight=weight_of(output, batch, weigh_rows=False))

    def _loss(self, batch: Batch, args: Sequence[Any]) -> LossOutput:
        with autocast(self.group.device, self.dtype):
            return call_loss(self.loss, None, batch, *args)

    def _after(self, state: TrainState, module: nn.Module) -> TrainState:
        buffers = {name: tensor.detach() for name, tensor in module.named_buffers() if name in state.buffers}
        self.group.copy_first([tensor for name, tensor in buffers.items() if name not in state.layout.transient])
        return state.replace(params=_own(module, state.params), buffers=buffers, step=state.step + 1)


class _Root(nn.Module):
    """What the engine runs: the loss of a module, whatever that calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.run: Callable[[], LossOutput] | None = None
        self.output: LossOutput | None = None

    def forward(self) -> Tensor:
        assert self.run is not None
        self.output = self.run()
        return self.output.loss


def initialize(
    module: nn.Module,
    config: Mapping[str, Any],
    device: torch.device,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    groups: Iterable[Mapping[str, Any]] | None = None,
) -> Any:
    """DeepSpeed's engine around a module; the processes are those of torch's default group.

    Args:
        module: its parameters become the engine's, which writes them in place; at stage 3 each process keeps a part of each.
        config: DeepSpeed's, without "auto".
        device: where it computes.
        optimizer: of the module's parameters; None where the configuration names one.
        groups: the parameters of the optimizer that the configuration names.

    Returns:
        The engine. Its `module` holds the given one.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed reads when it is imported
    check_installed()
    import deepspeed

    config = {"steps_per_print": float("inf"), **copy.deepcopy(dict(config))}
    if optimizer is not None:  # which DeepSpeed takes for untested
        config = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **config}
    engine, *_ = deepspeed.initialize(model=_Root(module), optimizer=optimizer, model_parameters=groups, config=config)
    return engine


MISSING = (
    "deepspeed= needs the package deepspeed, which is not there: pip install deepspeed, or use fsdp='full_shard', which shards "
    "what ZeRO's stage 3 does."
)
"""What is said where it is not installed."""


def check_installed() -> None:
    """Raise MissingDependencyError where DeepSpeed is not installed; it is not imported."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError(MISSING)


def inert(label: str) -> Transform:
    """What stands for DeepSpeed's optimizer where a Transform is expected: it keeps no state and cannot be called.

    Args:
        label: that optimizer in words.

    >>> inert("DeepSpeed's own AdamW").init({})
    ()
    """

    def update(grads: Params, state: Any, params: Params | None) -> Any:
        raise ArgumentError(f"Under DeepSpeed no transform updates the weights, but {label}.")

    return Transform(lambda params: (), update, label=label)


def is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO's stage 3 has cut the parameters of a module, so that each is empty while nobody needs it.

    >>> is_partitioned(nn.Linear(1, 1))
    False
    """
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def in_buffers(module: nn.Module) -> bool:
    """Whether parameters lie in larger buffers, as ZeRO lays them out, so that files cannot take them as they are.

    >>> in_buffers(nn.Linear(1, 1))
    False
    """
    return is_partitioned(module) or any(p.untyped_storage().nbytes() > p.nbytes for p in module.parameters() if p.nbytes)


def whole_parameters(parameters: Iterable[Tensor], *, write: bool = False) -> AbstractContextManager[Any]:
    """Let parameters be whole in all processes until the block ends, where ZeRO's stage 3 has cut them; all call it.

    Args:
        parameters: those of other modules stay as they are.
        write: whether what the first process writes into them shall last.

    >>> with whole_parameters(nn.Linear(1, 1).parameters()):
    ...     pass
    """
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    return cast(AbstractContextManager[Any], deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if write else None))


def _own(module: nn.Module, params: Params) -> Params:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if name in params}


def _norm(module: nn.Module) -> Tensor | None:
    """The norm of the averaged gradients, which the engine does not tell where it runs a plain optimizer."""
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(grads) if grads else None
