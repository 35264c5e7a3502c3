"""What a run does once arguments and data sizes are known, and arithmetic on arguments that several packages share."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol, TypeVar

import attrs
import torch

from fts.trainer.arguments.data_parallel import DataParallelArguments, num_parallel_batches
from fts.typing import Schedule

A = TypeVar("A")


@attrs.frozen
class Plan:
    """What a run does, resolved from arguments and data sizes.

    Attributes:
        total_steps: the update at which it ends.
        epochs: how many passes over the data are begun.
        steps_per_epoch: None where the data has no length.
        warmup_steps: updates of warm-up.
        logging_steps: updates between logs, if logs come by steps.
        eval_steps: updates between evaluations, if they come by steps.
        save_steps: updates between checkpoints, if they come by steps.
        train_batch_size: examples in a micro-batch of one process.
        accumulate: micro-batches in an update.
        samples: examples that the run visits.
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


def total_train_batch_size(args: DataParallelArguments, batch_size: int) -> int:
    """Examples in an update, over all processes.

    Args:
        args: the training arguments.
        batch_size: examples in a micro-batch of one process.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> total_train_batch_size(TrainingArguments(gradient_accumulation_steps=2), 8)
    16
    """
    return batch_size * args.gradient_accumulation_steps * num_parallel_batches(args)


def resolve_steps(value: float, total: int) -> int:
    """A number of steps: as given, or for a value below 1 that share of all steps.

    >>> resolve_steps(10, 100), resolve_steps(0.25, 10)
    (10, 3)
    """
    return math.ceil(value * total) if value < 1 else int(value)


class EvalPrecision(Protocol):
    """The arguments that set the precision of evaluation."""

    fp16_full_eval: bool
    bf16_full_eval: bool


def eval_dtype(args: EvalPrecision) -> torch.dtype | None:
    """What the model is cast to for evaluation; None leaves it as it is.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> eval_dtype(TrainingArguments(bf16_full_eval=True))
    torch.bfloat16
    """
    if args.fp16_full_eval:
        return torch.float16
    return torch.bfloat16 if args.bf16_full_eval else None


def with_settings(args: A, **settings: Any) -> A:
    """A copy of arguments with some changed; the arguments themselves if that changes nothing.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> with_settings(TrainingArguments(seed=1), seed=2).seed
    2
    """
    if all(getattr(args, name) == value for name, value in settings.items()):
        return args
    changed = copy.copy(args)
    for name, value in settings.items():
        setattr(changed, name, value)
    return changed
