"""From arguments and data sizes to everything that a run needs to know."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import attrs
import torch

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments, check_contradictions
from fts.trainer.data.shards import sharers
from fts.trainer.model.float8 import check_float8
from fts.trainer.optimization.schedules import make_schedule
from fts.typing import Schedule


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
        precision: None, "bf16" or "fp16".
        compiled: whether the step runs as one graph.
        compile_backend: what compiles it; None for the default.
        compile_mode: its mode; None for the default.
        schedule: the learning rate by update.
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
    compile_backend: str | None
    compile_mode: str | None
    schedule: Schedule = attrs.field(eq=False)


def make_plan(
    args: TrainingArguments, *, batches: int | None, items: int | None, batch_size: int | None = None, offset: int = 0
) -> Plan:
    """Resolve arguments for data of a given size.

    Args:
        args: the arguments.
        batches: micro-batches of each process in an epoch; None where the data does not tell.
        items: rows in an epoch; None where the data does not tell.
        batch_size: rows in a micro-batch, where they are not those of the arguments.
        offset: updates to add where `num_train_epochs` decides, because some epochs were cut into others.

    Returns:
        The plan, a function of the arguments of this call alone.

    Raises:
        ArgumentError: arguments contradict each other, or the data has no length and `max_steps` does not give one.

    >>> plan = make_plan(TrainingArguments(num_train_epochs=1.5, warmup_steps=0.1), batches=20, items=160)
    >>> plan.total_steps, plan.epochs, plan.warmup_steps
    (30, 2, 3)
    """
    check_contradictions(args)
    size = args.train_batch_size if batch_size is None else batch_size
    per_epoch = None if batches is None else max(1, -(-batches // args.gradient_accumulation_steps))
    rows_per_step = rows_per_update(args, size)
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
    warmup = args.get_warmup_steps(total)
    return Plan(
        total_steps=total,
        epochs=epochs,
        steps_per_epoch=per_epoch,
        warmup_steps=warmup,
        logging_steps=steps_of(args.logging_steps, total),
        eval_steps=steps_of(args.eval_steps or args.logging_steps, total),
        save_steps=steps_of(args.save_steps, total),
        train_batch_size=size,
        accumulate=args.gradient_accumulation_steps,
        samples=samples,
        precision=precision_of(args),
        compiled=args.torch_compile,
        compile_backend=args.torch_compile_backend,
        compile_mode=args.torch_compile_mode,
        schedule=make_schedule(args, total, warmup),
    )


def rows_per_update(args: TrainingArguments, batch_size: int) -> int:
    """Rows in an update, over all processes, where each micro-batch has so many.

    >>> rows_per_update(TrainingArguments(gradient_accumulation_steps=2), 8)
    16
    """
    return batch_size * args.gradient_accumulation_steps * sharers(args)


def steps_of(value: float, total: int) -> int:
    """A number of steps that is given as such, or, below 1, as a share of all.

    >>> steps_of(10, 100), steps_of(0.25, 10)
    (10, 3)
    """
    return math.ceil(value * total) if value < 1 else int(value)


def precision_of(args: TrainingArguments) -> str | None:
    """In which precision losses are computed: None for that of the parameters, "bf16" or "fp16".

    Beside the linear layers that compute in float8 (`accelerate launch --mixed_precision fp8`) everything is in "bf16".

    Raises:
        ArgumentError: the hardware does not compute in it, or it is unknown.
        MissingDependencyError: a package is missing.
    """
    precision = args.mixed_precision
    if precision == "fp8":
        check_float8(args.device)
        return "bf16"
    if precision not in ("no", "bf16", "fp16"):
        raise ArgumentError(f"ACCELERATE_MIXED_PRECISION={precision!r} is unknown. Use 'no', 'bf16', 'fp16' or 'fp8'.")
    return None if precision == "no" else precision


def evaluation_dtype(args: TrainingArguments) -> torch.dtype | None:
    """What the model is cast to for evaluation; None leaves it as it is.

    >>> evaluation_dtype(TrainingArguments(bf16_full_eval=True))
    torch.bfloat16
    """
    if args.fp16_full_eval:
        return torch.float16
    return torch.bfloat16 if args.bf16_full_eval else None


def with_settings(args: TrainingArguments, **settings: Any) -> TrainingArguments:
    """A copy of arguments with some changed; the arguments themselves if that changes nothing.

    >>> with_settings(TrainingArguments(seed=1), seed=2).seed
    2
    """
    if all(getattr(args, name) == value for name, value in settings.items()):
        return args
    changed = copy.copy(args)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed


def initial_values(
    args: TrainingArguments, loader: Any, rows_per_step: int, count_rows: Callable[[Any], int]
) -> tuple[int, int, int, float, bool, int | None, int]:
    """What Hugging Face's `set_initial_training_values` gives.

    Args:
        args: the arguments.
        loader: the batches of training.
        rows_per_step: rows in an update.
        count_rows: how many rows a loader has.

    Returns:
        Epochs, updates in an epoch, rows, rows over the whole run, whether epochs decide when to stop, batches of each process in
        an epoch (None if unknown), and updates in all.
    """
    batches = -(-len(loader) // sharers(args)) if hasattr(loader, "__len__") else None
    plan = make_plan(args, batches=batches, items=None if batches is None else count_rows(loader))
    rows = plan.total_steps * rows_per_step if batches is None else count_rows(loader)
    per_epoch = plan.steps_per_epoch or plan.total_steps
    by_epochs = args.max_steps <= 0
    total = args.num_train_epochs * rows if by_epochs else float(plan.total_steps * rows_per_step)
    return plan.epochs, per_epoch, rows, total, by_epochs, batches, plan.total_steps
