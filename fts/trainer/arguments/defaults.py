"""Defaults that depend on other arguments.

A rule applies until its argument is set; a derived value is derived anew when another argument changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import attrs
import torch

from fts.errors import ArgumentError
from fts.trainer.arguments.enums import IntervalStrategy, SchedulerType


class DefaultArguments(Protocol):
    """The arguments that defaults depend on."""

    eval_strategy: IntervalStrategy | str
    logging_steps: float
    lr_scheduler_type: SchedulerType | str
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    torch_compile: bool
    torch_compile_backend: str | None
    torch_compile_mode: str | None
    use_cpu: bool
    dataloader_num_workers: int


@attrs.frozen
class DefaultRule:
    """How the default of an argument follows from others.

    Attributes:
        name: the argument.
        unset: its value where it was not given.
        derive: gives the default.
    """

    name: str
    unset: Any
    derive: Callable[[DefaultArguments], Any]


def _do_eval(args: DefaultArguments) -> bool:
    return args.eval_strategy != IntervalStrategy.NO


def _eval_steps(args: DefaultArguments) -> float | None:
    return args.logging_steps if args.eval_strategy == IntervalStrategy.STEPS else None


def _metric_for_best_model(args: DefaultArguments) -> str | None:
    follows_metric = args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    return "loss" if args.load_best_model_at_end or follows_metric else None


def _greater_is_better(args: DefaultArguments) -> bool | None:
    return None if args.metric_for_best_model is None else not args.metric_for_best_model.endswith("loss")


def _disable_tqdm(args: DefaultArguments) -> bool:
    return logging.getLogger("fts").getEffectiveLevel() > logging.WARNING


def _torch_compile(args: DefaultArguments) -> bool:
    explicit_backend = args.torch_compile_backend is not None and "torch_compile_backend" not in derived_names(args)
    return explicit_backend or args.torch_compile_mode is not None


def _torch_compile_backend(args: DefaultArguments) -> str | None:
    return "inductor" if args.torch_compile else None


def _dataloader_pin_memory(args: DefaultArguments) -> bool:
    return not args.use_cpu


def _multiprocessing_context(args: DefaultArguments) -> str | None:
    return "fork" if args.dataloader_num_workers > 1 and torch.backends.mps.is_available() else None


RULES = (
    DefaultRule("do_eval", False, _do_eval),
    DefaultRule("eval_steps", None, _eval_steps),
    DefaultRule("metric_for_best_model", None, _metric_for_best_model),
    DefaultRule("greater_is_better", None, _greater_is_better),
    DefaultRule("disable_tqdm", None, _disable_tqdm),
    DefaultRule("torch_compile", False, _torch_compile),
    DefaultRule("torch_compile_backend", None, _torch_compile_backend),
    DefaultRule("dataloader_pin_memory", True, _dataloader_pin_memory),
    DefaultRule("dataloader_multiprocessing_context", None, _multiprocessing_context),
)

ALIASES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Two names of one argument: Hugging Face's newer, and the older, which most scripts use."""


def derived_names(args: DefaultArguments) -> frozenset[str]:
    """The arguments that were derived, not given."""
    return frozenset(args.__dict__.get("_derived", ()))


def explicit_names(args: DefaultArguments) -> frozenset[str]:
    """The arguments that were set after construction."""
    return frozenset(args.__dict__.get("_explicit", ()))


def mark_explicit(args: DefaultArguments, name: str, value: Any) -> None:
    """Record that an argument was set after construction, so that no rule changes it; None lets the rule apply again."""
    explicit = explicit_names(args) - {name} if value is None else explicit_names(args) | {name}
    object.__setattr__(args, "_explicit", explicit)
    object.__setattr__(args, "_derived", derived_names(args) - {name})


def derive_defaults(args: DefaultArguments) -> None:
    """Fill in the arguments that were not given; idempotent."""
    explicit = explicit_names(args)
    for rule in RULES:
        derived, current = derived_names(args), getattr(args, rule.name)
        if rule.name in derived or (current is rule.unset and rule.name not in explicit):
            value = rule.derive(args)
            object.__setattr__(args, rule.name, value)
            object.__setattr__(args, "_derived", derived - {rule.name} if value is rule.unset else derived | {rule.name})
    for one in ("activation_checkpointing", "activation_checkpointing_kwargs"):
        _merge_aliases(args, one, ALIASES[one], None if one.endswith("kwargs") else False)


def _merge_aliases(args: DefaultArguments, one: str, other: str, unset: Any) -> None:
    first, second = getattr(args, one), getattr(args, other)
    if first is not None and second is not None and first != second:
        raise ArgumentError(
            f"{one}={first!r} and {other}={second!r} are two names of one argument. Give one of them, or the same value to both."
        )
    value = first if first is not None else second
    value = unset if value is None else value
    object.__setattr__(args, one, value)
    object.__setattr__(args, other, value)
