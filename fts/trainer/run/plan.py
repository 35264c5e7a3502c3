"""From arguments and data sizes to a plan: everything that a run needs to know."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.loops import Source
from fts.trainer.arguments import (
    Plan,
    TrainingArguments,
    check_conflicts,
    num_parallel_batches,
    resolve_steps,
    total_train_batch_size,
    with_settings,
)
from fts.trainer.model import check_float8
from fts.trainer.optimization import make_schedule
from fts.trainer.run.context import RunContext


def make_plan(
    args: TrainingArguments, *, batches: int | None, num_examples: int | None, batch_size: int | None = None, offset: int = 0
) -> Plan:
    """Resolve arguments for data of a given size.

    Args:
        args: the arguments.
        batches: micro-batches of each rank in an epoch; None where the data has no length.
        num_examples: in an epoch; None where the data has no length.
        batch_size: examples in a micro-batch, where it is not that of the arguments.
        offset: updates to add where `num_train_epochs` decides, because earlier epochs were split into updates in another way.

    Returns:
        The plan, a function of the arguments of this call alone.

    Raises:
        ArgumentError: arguments contradict each other, or the data has no length and `max_steps` does not give one.

    >>> plan = make_plan(TrainingArguments(num_train_epochs=1.5, warmup_steps=0.1), batches=20, num_examples=160)
    >>> plan.total_steps, plan.epochs, plan.warmup_steps
    (30, 2, 3)
    """
    check_conflicts(args)
    size = args.train_batch_size if batch_size is None else batch_size
    per_epoch = None if batches is None else max(1, -(-batches // args.gradient_accumulation_steps))
    examples_per_step = total_train_batch_size(args, size)
    if args.max_steps > 0:
        total = args.max_steps
        epochs = 1 if per_epoch is None else -(-total // per_epoch)
        samples: float = total * examples_per_step
    elif per_epoch is None:
        raise ArgumentError("max_steps=-1 with training data that has no length: nothing says when to end. Set max_steps.")
    else:
        total = max(1, math.ceil(args.num_train_epochs * per_epoch) + offset)
        epochs = math.ceil(args.num_train_epochs)
        samples = total * examples_per_step if offset else args.num_train_epochs * (num_examples or 0)
    warmup = args.get_warmup_steps(total)
    return Plan(
        total_steps=total,
        epochs=epochs,
        steps_per_epoch=per_epoch,
        warmup_steps=warmup,
        logging_steps=resolve_steps(args.logging_steps, total),
        eval_steps=resolve_steps(args.eval_steps or args.logging_steps, total),
        save_steps=resolve_steps(args.save_steps, total),
        train_batch_size=size,
        accumulate=args.gradient_accumulation_steps,
        samples=samples,
        precision=autocast_precision(args),
        compiled=args.torch_compile,
        compile_backend=args.torch_compile_backend,
        compile_mode=args.torch_compile_mode,
        schedule=make_schedule(args, total, warmup),
    )


def autocast_precision(args: TrainingArguments) -> str | None:
    """The precision in which losses are computed: None for that of the parameters, "bf16" or "fp16".

    With `accelerate launch --mixed_precision fp8` linear layers compute in float8, and everything else in "bf16".

    Raises:
        ArgumentError: the hardware does not support it, or it is unknown.
        MissingDependencyError: a package is missing.
    """
    precision = args.mixed_precision
    if precision == "fp8":
        check_float8(args.device)
        return "bf16"
    if precision not in ("no", "bf16", "fp16"):
        raise ArgumentError(f"ACCELERATE_MIXED_PRECISION={precision!r} is unknown. Use 'no', 'bf16', 'fp16' or 'fp8'.")
    return None if precision == "no" else precision


def initial_values(
    args: TrainingArguments, loader: Any, examples_per_step: int, count_examples: Callable[[Any], int]
) -> tuple[int, int, int, float, bool, int | None, int]:
    """What Hugging Face's `set_initial_training_values` gives.

    Args:
        args: the arguments.
        loader: the batches of training.
        examples_per_step: examples in an update.
        count_examples: how many examples a loader has.

    Returns:
        Epochs, updates in an epoch, examples, examples over the run, whether epochs decide when to stop, batches of each rank in
        an epoch (None if unknown), and updates in all.
    """
    batches = -(-len(loader) // num_parallel_batches(args)) if hasattr(loader, "__len__") else None
    plan = make_plan(args, batches=batches, num_examples=None if batches is None else count_examples(loader))
    num_examples = plan.total_steps * examples_per_step if batches is None else count_examples(loader)
    per_epoch = plan.steps_per_epoch or plan.total_steps
    by_epochs = args.max_steps <= 0
    total = args.num_train_epochs * num_examples if by_epochs else float(plan.total_steps * examples_per_step)
    return plan.epochs, per_epoch, num_examples, total, by_epochs, batches, plan.total_steps


def resolve_plan(context: RunContext, source: Source, batch_size: int, offset: int = 0) -> Plan:
    """The plan for a source; an overridden `set_initial_training_values` decides on epochs, examples and updates.

    Args:
        context: what the run is given.
        source: the batches of training.
        batch_size: examples in a micro-batch.
        offset: see `make_plan`.
    """
    args, override = context.args, context.hooks.set_initial_training_values
    sizes: dict[str, Any] = {"batches": source.batches_per_epoch, "num_examples": source.num_examples, "batch_size": batch_size}
    if override is None:
        return make_plan(args, **sizes, offset=offset)
    total_train_batch_size = context.hooks.total_train_batch_size()
    takes_size = len(inspect.signature(override).parameters) > 2
    values = override(args, context.callback_handler.train_dataloader, *([total_train_batch_size] if takes_size else []))
    plan = make_plan(with_settings(args, max_steps=values[-1]), **sizes)
    return attrs.evolve(plan, epochs=values[0], samples=values[3])
