"""The step of a run, composed of the model's loss, the plan's optimizer, and what a subclass replaced."""

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
from fts.errors import ArgumentError
from fts.steps import MicroBatches, PaddingBatch
from fts.trainer.data.batch_samples import SampledBatches
from fts.trainer.distributed.accelerator import scaler_of
from fts.trainer.model.loss import Items, LossRule, count_labels, counts_shifted, item_count, own_loss, step_loss
from fts.trainer.run.overrides import overridden
from fts.trainer.run.plan import Plan
from fts.typing import Batch, Transform


@attrs.frozen(eq=False)
class Overrides:
    """What the user put in the place of the Trainer's own methods; None where nothing.

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
    scaler: steps.Scaler | None = None


@attrs.frozen(eq=False)
class Across:
    """The processes that take a step together.

    Attributes:
        group: the processes.
        averages_tokens: whether losses are divided by the labels of all processes, or by those of each one alone.
        devices: the GPUs among which this process cuts each batch; empty where it has not several.
    """

    group: Group
    averages_tokens: bool = True
    devices: tuple[int, ...] = ()


ALONE = Across(Group())


def overrides_of(trainer: Any) -> Overrides:
    """What a trainer's class, or the instance, has in the place of the Trainer's own methods."""

    def own(*names: str) -> Any:
        return getattr(trainer, names[0]) if overridden(trainer, *names) else None

    training_step = own("training_step")
    scales = training_step is not None and trainer.args.mixed_precision == "fp16"
    return Overrides(
        compute_loss=own("compute_loss"),
        training_step=training_step,
        context=own("compute_loss_context_manager", "autocast_smart_context_manager"),
        prepare_inputs=own("_prepare_inputs"),
        scaler=scaler_of(trainer.accelerator) if scales else None,
    )


def compose_step(
    model: nn.Module,
    rule: LossRule,
    plan: Plan,
    transform: Transform,
    replaced: Overrides = Overrides(),
    across: Across = ALONE,
) -> Any:
    """Compose the step of training.

    Only what is asked for is in it: one micro-batch of a model's own loss needs neither a count of labels nor a scale.

    Args:
        model: lends its code.
        rule: how the loss is computed and scaled.
        plan: precision, accumulation and compilation.
        transform: the optimizer.
        replaced: the user's own parts.
        across: the processes that take the step together, each with micro-batches of its own.

    Returns:
        `(state, batch) -> (state, metrics)`, which `fts.distributed.distribute` makes that of all processes.

    Raises:
        ArgumentError: the step is to be compiled, or cut among GPUs, and the user's `training_step` cannot be.
    """
    if across.devices:
        _check_devices(plan, replaced, across)
    if replaced.training_step is not None:
        if plan.compiled:
            raise ArgumentError(
                "torch_compile=True compiles the whole step, but an overridden training_step calls backward itself, which a "
                "graph cannot follow. Override compute_loss instead, or set torch_compile=False."
            )
        own_step = _own_step(replaced.training_step, across.group.size)
        step: Any = steps.gradient_step(steps.manual_backward(model, own_step, scaler=replaced.scaler), transform)
        return steps.with_full_batch(step, items_by(rule, model, across))
    simple = replaced.compute_loss is None and replaced.context is None and replaced.prepare_inputs is None
    own = not rule.counts and not rule.smoothing and rule.scaled is None
    if simple and own and plan.accumulate == 1 and across.group.size == 1 and not across.devices:
        return _compiled(steps.train_step(steps.module_loss(model), transform, precision=plan.precision), plan)
    compute = replaced_loss(rule, replaced)
    if across.devices:
        weigh = partial(item_count, model, label_names=rule.label_names)
        compute = data_parallel_loss(model, compute, weigh, rule.is_scaled, across.devices)
    loss = step_loss(compute, rule)
    precision = None if replaced.context is not None else plan.precision
    step = steps.train_step(steps.module_loss(model, loss), transform, precision=precision)
    return steps.with_full_batch(_compiled(step, plan), items_by(rule, model, across))


def _check_devices(plan: Plan, replaced: Overrides, across: Across) -> None:
    what = "torch_compile=True" if plan.compiled else ""
    if replaced.training_step is not None:
        what = "an overridden training_step"
    if what:
        raise ArgumentError(
            f"{what} cannot be used with {len(across.devices)} GPUs in one process. Start a process for each: torchrun "
            f"--nproc-per-node {len(across.devices)} script.py. Or show it one GPU by CUDA_VISIBLE_DEVICES=0."
        )


def items_by(rule: LossRule, model: nn.Module, across: Across = ALONE) -> Callable[[Batch], Sequence[Items]]:
    """From the batch of a step to what its losses are told of it."""
    shift = counts_shifted(model)

    def items_in(batch: Batch, micro: Sequence[Batch]) -> Any:
        if isinstance(batch, SampledBatches):
            return batch.items_in_batch
        return count_labels(micro, shift) if rule.counts else None

    def count_items(batch: Batch) -> Sequence[Items]:
        micro = [part for part in (batch if isinstance(batch, MicroBatches) else (batch,)) if not isinstance(part, PaddingBatch)]
        labels = items_in(batch, micro)
        if across.group.size == 1:
            return (Items(labels, len(micro)),)
        return (_summed(Items(labels, len(micro)), across, counts=rule.counts),)

    return count_items


def _summed(items: Items, across: Across, *, counts: bool) -> Items:
    """What the losses of all processes are told of the step, of which each knows its own part."""
    own = 0 if items.labels is None else items.labels
    sums = torch.stack([torch.as_tensor(value, dtype=torch.int64, device=across.group.device) for value in (own, items.parts)])
    labels, parts = across.group.sum(sums).unbind()
    known = counts and (items.labels is not None or not items.parts)  # a process without a micro-batch takes the others' word
    if across.averages_tokens:
        return Items(labels if known else None, parts)
    return Items(items.labels if items.labels is not None or not known else labels.new_ones(()), parts / across.group.size)


def _own_step(training_step: Callable[..., Any], processes: int) -> Callable[[nn.Module, Any, Items], Any]:
    def step(model: nn.Module, batch: Any, items: Items) -> Any:
        owner: Any = getattr(training_step, "__self__", None)
        # the mean over processes is taken of these gradients, so each is told its share of what all have together
        labels, parts = items
        if processes > 1:
            labels, parts = None if labels is None else labels / processes, float(parts) / processes
        if owner is not None:
            owner.current_gradient_accumulation_steps = parts
        return training_step(model, batch, labels)

    return step


def replaced_loss(rule: LossRule, replaced: Overrides) -> Callable[[Any, Any, Any], Any]:
    """The loss `(model, batch, count) -> loss` for `step_loss`: the user's own, or that of the rule."""
    compute = own_loss(rule) if replaced.compute_loss is None else _called(replaced.compute_loss)
    if replaced.context is None and replaced.prepare_inputs is None:
        return compute

    def within(model: Any, batch: Any, count: Any) -> Any:
        inputs = batch if replaced.prepare_inputs is None else replaced.prepare_inputs(batch)
        if replaced.context is None:
            return compute(model, inputs, count)
        with replaced.context():
            return compute(model, inputs, count)

    return within


def _called(compute_loss: Callable[..., Any]) -> Callable[[Any, Any, Any], Any]:
    ask = with_count(compute_loss)

    def compute(model: Any, batch: Any, count: Any) -> Any:
        return ask(model, dict(batch), count)  # a copy: many pop the labels

    compute.__name__ = "compute_loss"
    return compute


def with_count(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """`(model, inputs, count, **kwargs)`, for a `compute_loss` that takes `num_items_in_batch` or does not know it yet."""
    parameters = inspect.signature(compute_loss).parameters
    if "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return lambda model, inputs, count, **kwargs: compute_loss(model, inputs, num_items_in_batch=count, **kwargs)
    return lambda model, inputs, count, **kwargs: compute_loss(model, inputs, **kwargs)


def _compiled(step: Any, plan: Plan) -> Any:
    if not plan.compiled:
        return step
    options: dict[str, Any] = {} if plan.compile_mode is None else {"mode": plan.compile_mode}
    return steps.compile(step, backend=plan.compile_backend or "inductor", **options)
