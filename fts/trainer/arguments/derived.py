"""What arguments follow from others.

A rule holds until its argument is set; what was derived follows again when another argument changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fts.errors import ArgumentError
from fts.trainer.arguments.choices import IntervalStrategy, SchedulerType

if TYPE_CHECKING:
    from fts.trainer.arguments.training_arguments import TrainingArguments


@attrs.frozen
class Rule:
    """How an argument follows from others.

    Attributes:
        name: the argument.
        unset: its value where it was not given.
        value: what it is then.
    """

    name: str
    unset: Any
    value: Callable[[TrainingArguments], Any]


def _do_eval(args: TrainingArguments) -> bool:
    return args.eval_strategy != IntervalStrategy.NO


def _eval_steps(args: TrainingArguments) -> float | None:
    return args.logging_steps if args.eval_strategy == IntervalStrategy.STEPS else None


def _metric(args: TrainingArguments) -> str | None:
    watched = args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    return "loss" if args.load_best_model_at_end or watched else None


def _greater_is_better(args: TrainingArguments) -> bool | None:
    return None if args.metric_for_best_model is None else not args.metric_for_best_model.endswith("loss")


def _disable_tqdm(args: TrainingArguments) -> bool:
    return logging.getLogger("fts").getEffectiveLevel() > logging.WARNING


def _torch_compile(args: TrainingArguments) -> bool:
    backend = args.torch_compile_backend is not None and "torch_compile_backend" not in derived_of(args)
    return backend or args.torch_compile_mode is not None


def _backend(args: TrainingArguments) -> str | None:
    return "inductor" if args.torch_compile else None


def _pin_memory(args: TrainingArguments) -> bool:
    return not args.use_cpu


def _start(args: TrainingArguments) -> str | None:
    return "fork" if args.dataloader_num_workers > 1 and torch.backends.mps.is_available() else None


RULES = (
    Rule("do_eval", False, _do_eval),
    Rule("eval_steps", None, _eval_steps),
    Rule("metric_for_best_model", None, _metric),
    Rule("greater_is_better", None, _greater_is_better),
    Rule("disable_tqdm", None, _disable_tqdm),
    Rule("torch_compile", False, _torch_compile),
    Rule("torch_compile_backend", None, _backend),
    Rule("dataloader_pin_memory", True, _pin_memory),
    Rule("dataloader_multiprocessing_context", None, _start),
)

TWINS = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Two names of one thing: Hugging Face's newer, and the older, which most scripts use."""


def derived_of(args: TrainingArguments) -> frozenset[str]:
    """The arguments that were derived, not given."""
    return frozenset(args.__dict__.get("_derived", ()))


def chosen_of(args: TrainingArguments) -> frozenset[str]:
    """The arguments that were set after construction."""
    return frozenset(args.__dict__.get("_chosen", ()))


def note_choice(args: TrainingArguments, name: str, value: Any) -> None:
    """Keep in mind that an argument was set after construction, so that no rule overrules it; None lets rules decide again."""
    chosen = chosen_of(args) - {name} if value is None else chosen_of(args) | {name}
    object.__setattr__(args, "_chosen", chosen)
    object.__setattr__(args, "_derived", derived_of(args) - {name})


def derive(args: TrainingArguments) -> None:
    """Fill in the arguments that were not given; doing so twice changes nothing."""
    chosen = chosen_of(args)
    for rule in RULES:
        derived, current = derived_of(args), getattr(args, rule.name)
        if rule.name in derived or (current is rule.unset and rule.name not in chosen):
            value = rule.value(args)
            object.__setattr__(args, rule.name, value)
            object.__setattr__(args, "_derived", derived - {rule.name} if value is rule.unset else derived | {rule.name})
    for one in ("activation_checkpointing", "activation_checkpointing_kwargs"):
        _join_twins(args, one, TWINS[one], None if one.endswith("kwargs") else False)


def _join_twins(args: TrainingArguments, one: str, other: str, unset: Any) -> None:
    first, second = getattr(args, one), getattr(args, other)
    if first is not None and second is not None and first != second:
        raise ArgumentError(
            f"{one}={first!r} and {other}={second!r} are two names of one argument. Give one of them, or the same value to both."
        )
    value = first if first is not None else second
    value = unset if value is None else value
    object.__setattr__(args, one, value)
    object.__setattr__(args, other, value)
