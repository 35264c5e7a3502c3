"""The step of a run, composed of the model's loss, the plan's optimizer, and what a subclass overrides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import attrs
import torch
from torch import nn

from fts import steps
from fts.distributed import Group
from fts.distributed.data_parallel import data_parallel_loss
from fts.distributed.deepspeed import DeepSpeedStep
from fts.errors import ArgumentError
from fts.steps import MicroBatches, PaddingBatch
from fts.steps.precision import autocast_dtype
from fts.trainer.arguments import Plan
from fts.trainer.data import SampledBatches
from fts.trainer.model import (
    LossConfig,
    UpdateTotals,
    compute_loss_fn,
    count_labels,
    counts_shifted_labels,
    loss_denominator,
    micro_batch_loss,
)
from fts.trainer.optimization import RunOptimizer
from fts.typing import Batch, Transform


@attrs.frozen(eq=False)
class Overrides:
    """The methods of the Trainer that are overridden, of those that a step is composed of; None where fts's own is used.

    Attributes:
        compute_loss: `(model, inputs, num_items_in_batch=...) -> loss`.
        training_step: `(model, inputs, num_items_in_batch) -> loss`; calls backward itself.
        context: makes the context in which a loss is computed.
        prepare_inputs: from a batch to the model's inputs.
        scaler: scales the losses of `training_step`, where it calls `accelerator.backward`.
    """

    compute_loss: Callable[..., Any] | None = None
    training_step: Callable[..., Any] | None = None
    context: Callable[[], AbstractContextManager[Any]] | None = None
    prepare_inputs: Callable[[Any], Any] | None = None
    scaler: steps.LossScaler | None = None


@attrs.frozen(eq=False)
class DataParallelConfig:
    """How an update is divided between ranks and GPUs.

    Attributes:
        group: the ranks that have micro-batches of their own.
        average_tokens: whether losses are divided by the labels of all ranks, or by those of each one alone.
        devices: the GPUs that this process splits each batch over; empty where it has not several.
    """

    group: Group
    average_tokens: bool = True
    devices: tuple[int, ...] = ()


SINGLE_PROCESS = DataParallelConfig(Group())


def compose_step(
    model: nn.Module,
    config: LossConfig,
    plan: Plan,
    transform: Transform,
    overrides: Overrides = Overrides(),
    parallel: DataParallelConfig = SINGLE_PROCESS,
) -> Any:
    """Compose the step of training.

    Only what is asked for is in it: one micro-batch of a model's own loss needs neither a count of labels nor a scale.

    Args:
        model: computes the loss.
        config: how the loss is computed and scaled.
        plan: precision, accumulation and compilation.
        transform: the optimizer.
        overrides: the overridden methods.
        parallel: the ranks, each with micro-batches of its own.

    Returns:
        `(state, batch) -> (state, metrics)`, which `fts.distributed.distribute` makes that of all ranks.

    Raises:
        ArgumentError: the step is to be compiled, or split over GPUs, and the overridden `training_step` cannot be.
    """
    if parallel.devices:
        _check_devices(plan, overrides, parallel)
    if overrides.training_step is not None:
        if plan.compiled:
            raise ArgumentError(
                "torch_compile=True compiles the step as one graph, but an overridden training_step calls backward itself, which "
                "a graph cannot follow. Override compute_loss instead, or set torch_compile=False."
            )
        own_step = _own_step(overrides.training_step, parallel.group.size)
        step: Any = steps.gradient_step(steps.manual_backward(model, own_step, scaler=overrides.scaler), transform)
        return steps.with_full_batch(step, count_update_totals(config, model, parallel))
    simple = overrides.compute_loss is None and overrides.context is None and overrides.prepare_inputs is None
    own = not config.needs_num_items and not config.label_smoothing and config.loss_is_scaled is None
    if simple and own and plan.accumulate == 1 and parallel.group.size == 1 and not parallel.devices:
        return _compiled(steps.train_step(steps.module_loss(model), transform, precision=plan.precision), plan)
    compute = effective_loss(config, overrides)
    if parallel.devices:
        weigh = partial(loss_denominator, model, label_names=config.label_names)
        compute = data_parallel_loss(model, compute, weigh, config.is_scaled, parallel.devices)
    loss = micro_batch_loss(compute, config)
    precision = None if overrides.context is not None else plan.precision
    step = steps.train_step(steps.module_loss(model, loss), transform, precision=precision)
    return steps.with_full_batch(_compiled(step, plan), count_update_totals(config, model, parallel))


def _check_devices(plan: Plan, overrides: Overrides, parallel: DataParallelConfig) -> None:
    what = "torch_compile=True" if plan.compiled else ""
    if overrides.training_step is not None:
        what = "an overridden training_step"
    if what:
        raise ArgumentError(
            f"{what} cannot be used with {len(parallel.devices)} GPUs in one process. Start a process for each: torchrun "
            f"--nproc-per-node {len(parallel.devices)} script.py. Or show it one GPU by CUDA_VISIBLE_DEVICES=0."
        )


def compose_deepspeed_step(
    model: nn.Module,
    config: LossConfig,
    plan: Plan,
    optimizer: RunOptimizer,
    overrides: Overrides,
    parallel: DataParallelConfig,
    stage: int,
) -> Any:
    """Compose the step of training that DeepSpeed's engine takes.

    Args:
        model: computes the loss.
        config: how the loss is computed and scaled.
        plan: the precision.
        optimizer: has the engine.
        overrides: the overridden methods.
        parallel: the ranks, each with micro-batches of its own.
        stage: ZeRO's.
    """
    loss = steps.module_loss(model, micro_batch_loss(effective_loss(config, overrides), config))
    dtype = None if overrides.context is not None else autocast_dtype(plan.precision)
    step = DeepSpeedStep(loss, optimizer.transform, parallel.group, optimizer.engine, dtype, stage)
    return steps.with_full_batch(step, count_update_totals(config, model, parallel))


def count_update_totals(
    config: LossConfig, model: nn.Module, parallel: DataParallelConfig = SINGLE_PROCESS
) -> Callable[[Batch], Sequence[UpdateTotals]]:
    """From the batch of an update to the totals that its losses are scaled by."""
    shift = counts_shifted_labels(model)

    def num_labels(batch: Batch, micro: Sequence[Batch]) -> Any:
        if isinstance(batch, SampledBatches):
            return batch.num_items_in_batch
        return count_labels(micro, shift) if config.needs_num_items else None

    def count(batch: Batch) -> Sequence[UpdateTotals]:
        micro = [part for part in (batch if isinstance(batch, MicroBatches) else (batch,)) if not isinstance(part, PaddingBatch)]
        totals = UpdateTotals(num_labels(batch, micro), len(micro))
        return (totals if parallel.group.size == 1 else _all_reduce(totals, parallel, counts=config.needs_num_items),)

    return count


def _all_reduce(totals: UpdateTotals, parallel: DataParallelConfig, *, counts: bool) -> UpdateTotals:
    """The totals by which each rank scales its losses, from the totals of its own micro-batches."""
    group = parallel.group
    own = 0 if totals.num_items_in_batch is None else totals.num_items_in_batch
    sums = torch.stack(
        [torch.as_tensor(value, dtype=torch.int64, device=group.device) for value in (own, totals.num_micro_batches)]
    )
    labels, parts = group.all_reduce(sums).unbind()
    known = counts and (
        totals.num_items_in_batch is not None or not totals.num_micro_batches
    )  # a rank without a micro-batch takes that of the others
    if parallel.average_tokens:
        return UpdateTotals(labels if known else None, parts)
    return UpdateTotals(
        totals.num_items_in_batch if totals.num_items_in_batch is not None or not known else labels.new_ones(()),
        parts / group.size,
    )


def _own_step(training_step: Callable[..., Any], world_size: int) -> Callable[[nn.Module, Any, UpdateTotals], Any]:
    def step(model: nn.Module, batch: Any, totals: UpdateTotals) -> Any:
        owner: Any = getattr(training_step, "__self__", None)
        # the gradients are averaged over ranks afterwards, so each gets its share of the totals
        labels, parts = totals
        if world_size > 1:
            labels, parts = None if labels is None else labels / world_size, float(parts) / world_size
        if owner is not None:
            owner.current_gradient_accumulation_steps = parts
        return training_step(model, batch, labels)

    return step


def effective_loss(config: LossConfig, overrides: Overrides) -> Callable[[Any, Any, Any], Any]:
    """The loss `(model, batch, count) -> loss` for `micro_batch_loss`: the overridden one, or that of the config."""
    compute = compute_loss_fn(config) if overrides.compute_loss is None else _with_copied_inputs(overrides.compute_loss)
    if overrides.context is None and overrides.prepare_inputs is None:
        return compute

    def compute_in_context(model: Any, batch: Any, count: Any) -> Any:
        inputs = batch if overrides.prepare_inputs is None else overrides.prepare_inputs(batch)
        if overrides.context is None:
            return compute(model, inputs, count)
        with overrides.context():
            return compute(model, inputs, count)

    return compute_in_context


def _with_copied_inputs(compute_loss: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    call = with_num_items(compute_loss)

    def compute(model: Any, batch: Any, count: Any) -> Any:
        return call(model, dict(batch), count)  # many pop the labels

    compute.__name__ = "compute_loss"
    return compute


def with_num_items(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """`(model, inputs, count, **kwargs)`, for a `compute_loss` that may take `num_items_in_batch` or not."""
    parameters = inspect.signature(compute_loss).parameters
    if "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return lambda model, inputs, count, **kwargs: compute_loss(model, inputs, num_items_in_batch=count, **kwargs)
    return lambda model, inputs, count, **kwargs: compute_loss(model, inputs, **kwargs)


def _compiled(step: Any, plan: Plan) -> Any:
    if not plan.compiled:
        return step
    options: dict[str, Any] = {} if plan.compile_mode is None else {"mode": plan.compile_mode}
    return steps.compile(step, backend=plan.compile_backend or "inductor", **options)
