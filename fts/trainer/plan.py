"""From arguments and data sizes to everything that a run needs to know."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import attrs
from torch import nn

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.choices import OptimizerNames, SchedulerType
from fts.typing import Schedule, Transform


@attrs.frozen
class Plan:
    """What a run does, resolved.

    Attributes:
        total_steps: at which update it ends.
        epochs: how many passes over the data are begun.
        steps_per_epoch: None where the data does not tell its length.
        warmup_steps: updates of warm-up.
        logging_steps: updates between logs, if logs come by steps.
        eval_steps: updates between evaluations, if they come by steps.
        save_steps: updates between checkpoints, if they come by steps.
        train_batch_size: rows in a micro-batch.
        accumulate: micro-batches in an update.
        samples: rows that the whole run visits.
        precision: None or "bf16".
        compiled: whether the step runs as one graph.
        schedule: the learning rate by update.
        transform: the optimizer.
    """

    total_steps: int
    epochs: int
    steps_per_epoch: int | None
    warmup_steps: int
    logging_steps: int
    eval_steps: int
    save_steps: int
    train_batch_size: int
    accumulate: int
    samples: float
    precision: str | None
    compiled: bool
    schedule: Schedule = attrs.field(eq=False)
    transform: Transform = attrs.field(eq=False)


def make_plan(
    args: TrainingArguments, *, batches: int | None, items: int | None, decayed: Collection[str] | None = None, offset: int = 0
) -> Plan:
    """Resolve arguments for data of a given size.

    Args:
        args: the arguments.
        batches: micro-batches in an epoch; None where the data does not tell.
        items: rows in an epoch; None where the data does not tell.
        decayed: names of the parameters that weight decay applies to; None for all.
        offset: updates to add where `num_train_epochs` decides, because some epochs were cut into others.

    Returns:
        The plan, a function of the arguments of this call alone.

    Raises:
        ArgumentError: the data has no length and `max_steps` does not give one.

    >>> plan = make_plan(TrainingArguments(num_train_epochs=1.5, warmup_steps=0.1), batches=20, items=160)
    >>> plan.total_steps, plan.epochs, plan.warmup_steps
    (30, 2, 3)
    """
    per_epoch = None if batches is None else max(1, -(-batches // args.gradient_accumulation_steps))
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps
    if args.max_steps > 0:
        total = args.max_steps
        epochs = 1 if per_epoch is None else -(-total // per_epoch)
        samples: float = total * rows_per_step
    elif per_epoch is None:
        raise ArgumentError("max_steps=-1 with training data that has no length: nothing says when to end. Set max_steps.")
    else:
        total = max(1, math.ceil(args.num_train_epochs * per_epoch) + offset)
        epochs = math.ceil(args.num_train_epochs)
        samples = total * rows_per_step if offset else args.num_train_epochs * (items or 0)
    warmup = steps_of(args.warmup_steps, total)
    schedule = make_schedule(args, total, warmup)
    return Plan(
        total_steps=total,
        epochs=epochs,
        steps_per_epoch=per_epoch,
        warmup_steps=warmup,
        logging_steps=steps_of(args.logging_steps, total),
        eval_steps=steps_of(args.eval_steps or args.logging_steps, total),
        save_steps=steps_of(args.save_steps, total),
        train_batch_size=args.train_batch_size,
        accumulate=args.gradient_accumulation_steps,
        samples=samples,
        precision="bf16" if args.bf16 else None,
        compiled=args.torch_compile,
        schedule=schedule,
        transform=make_transform(args, schedule, decayed),
    )


def steps_of(value: float, total: int) -> int:
    """A number of steps that is given as such, or, below 1, as a share of all.

    >>> steps_of(10, 100), steps_of(0.25, 10)
    (10, 3)
    """
    return math.ceil(value * total) if value < 1 else int(value)


def make_schedule(args: TrainingArguments, total: int, warmup: int) -> Schedule:
    """The learning rate as a function of the updates applied before."""
    peak, left = args.learning_rate, max(1, total - warmup)
    kind = args.lr_scheduler_type
    if kind == SchedulerType.CONSTANT:
        return tx.constant_schedule(peak)
    if kind == SchedulerType.CONSTANT_WITH_WARMUP:
        return tx.warmup(tx.constant_schedule(peak), warmup)
    if kind == SchedulerType.COSINE:
        return tx.cosine_schedule(peak, warmup_steps=warmup, total_steps=warmup + left)
    if kind == SchedulerType.POLYNOMIAL:
        return tx.polynomial_schedule(peak, 1e-7, 1.0, left, warmup_steps=warmup)
    return tx.linear_schedule(peak, 0.0, left, warmup_steps=warmup)


def make_transform(args: TrainingArguments, schedule: Schedule, decayed: Collection[str] | None) -> Transform:
    """The optimizer: clipping, then AdamW or SGD, with weight decay on the named parameters."""
    parts = [tx.clip_by_global_norm(args.max_grad_norm)] if args.max_grad_norm > 0 else []
    if args.optim == OptimizerNames.SGD:
        if args.weight_decay:
            parts.append(tx.add_decayed_weights(args.weight_decay, mask=decayed))
        parts.append(tx.sgd(schedule))
    else:
        mask = decayed if args.weight_decay else None
        betas = {"b1": args.adam_beta1, "b2": args.adam_beta2, "eps": args.adam_epsilon}
        parts.append(tx.adamw(schedule, **betas, weight_decay=args.weight_decay, mask=mask))
    return parts[0] if len(parts) == 1 else tx.chain(*parts)


_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")


def decayed_names(model: nn.Module) -> frozenset[str]:
    """The trained parameters that weight decay applies to: all but biases and the weights of normalisation layers.

    >>> sorted(decayed_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    ['0.weight']
    """
    norms = {
        f"{path}.{name}" if path else name
        for path, child in model.named_modules()
        if isinstance(child, nn.LayerNorm)
        for name, _ in child.named_parameters(recurse=False)
    }
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in norms and not _UNDECAYED.search(name.lower())
    )
