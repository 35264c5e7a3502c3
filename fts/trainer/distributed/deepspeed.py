"""A run whose weights DeepSpeed's engine updates: what it refuses, its configuration, and its start."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import attrs
from torch import nn

from fts.distributed.deepspeed import initialize, is_partitioned, placeholder_transform
from fts.distributed.strategies import DeepSpeed
from fts.errors import ArgumentError
from fts.steps.losses import base_model
from fts.trainer.arguments import (
    Plan,
    TrainingArguments,
    fill_deepspeed_config,
    finalize_deepspeed_config,
    load_deepspeed_config,
    resolve_strategy,
)
from fts.trainer.optimization import RunOptimizer, group_settings, make_parameter_groups, with_parameters


@attrs.frozen(eq=False)
class OptimizerMethods:
    """The methods by which a Trainer makes a torch optimizer and its schedule; a subclass may override each.

    Attributes:
        create_optimizer: makes the optimizer.
        create_scheduler: from the number of updates and an optimizer to its schedule.
        get_decay_parameter_names: from a model to the names of the parameters that weight decay applies to.
    """

    create_optimizer: Callable[[], Any]
    create_scheduler: Callable[[int, Any], Any]
    get_decay_parameter_names: Callable[[nn.Module], list[str]]


def check_deepspeed(
    args: TrainingArguments, *, own_step: bool = False, own_training_step: bool = False, method: str = ""
) -> None:
    """Raise ArgumentError where a run uses DeepSpeed, and something is asked for that cannot be had with it.

    Args:
        args: the arguments.
        own_step: whether a step of the user's own is to be trained with.
        own_training_step: whether `training_step` is overridden.
        method: the Trainer's method that is called; empty for `train`.
    """
    if not isinstance(resolve_strategy(args), DeepSpeed):
        return
    unsupported = {
        "Trainer(step=...)": own_step,
        "an overridden training_step": own_training_step,
        "torch_compile=True": args.torch_compile,
        f"nonfinite={args.nonfinite!r}": args.nonfinite in ("skip", "rollback"),
        "auto_find_batch_size=True": args.auto_find_batch_size,
        "bf16_full_eval=True": args.bf16_full_eval,
        "fp16_full_eval=True": args.fp16_full_eval,
        method: bool(method),
    }
    for name, asked in unsupported.items():
        if asked:
            raise ArgumentError(
                f"{name} cannot be used with deepspeed=: its engine runs the backward pass and the update by itself. Leave it "
                "out, or use fsdp='full_shard'."
            )


def check_deepspeed_resume(args: TrainingArguments, *, resumes: bool) -> None:
    """Raise ArgumentError where a run with DeepSpeed is to resume from a checkpoint."""
    if resumes and isinstance(resolve_strategy(args), DeepSpeed):
        raise ArgumentError(
            "resume_from_checkpoint cannot be used with deepspeed=: its checkpoints have the weights alone. What is missing are "
            "the optimizer's moments, which DeepSpeed would write pickled, and fts pickles nothing. Begin a new run with the "
            "model of a checkpoint: from_pretrained(path); or use fsdp='full_shard', which resumes."
        )


def placeholder_optimizer(strategy: DeepSpeed, args: TrainingArguments) -> RunOptimizer:
    """What stands for the optimizer until the engine has started."""
    named = strategy.config.get("optimizer")
    own = f"{named.get('type')} of its configuration" if isinstance(named, dict) else f"torch optimizer of optim='{args.optim}'"
    clipping = strategy.config.get("gradient_clipping")
    behind = f", gradients clipped to {clipping}" if clipping else ""
    return RunOptimizer(
        placeholder_transform(f"its own update by the {own}{behind}, in the place of fts's transform"), None, None
    )


def start_engine(
    model: nn.Module,
    args: TrainingArguments,
    plan: Plan,
    chosen: RunOptimizer,
    *,
    config: dict[str, Any],
    methods: OptimizerMethods,
    own_optimizer: bool,
) -> RunOptimizer:
    """Start DeepSpeed's engine around a model.

    Args:
        model: becomes the engine's.
        args: the arguments.
        plan: how long the run is.
        chosen: what `placeholder_optimizer` made.
        config: DeepSpeed's configuration, of `fill_config`.
        methods: make the optimizer and schedule that the configuration does not name.
        own_optimizer: whether the user gave an optimizer.

    Returns:
        What updates the weights, with the engine.
    """
    config = finalize_deepspeed_config(config, args, total_steps=plan.total_steps, hidden_size=hidden_size(model))
    named = "optimizer" in config
    if named and own_optimizer:
        raise ArgumentError("deepspeed= names an optimizer, and Trainer(optimizers=...) gives one. Leave one of them out.")
    optimizer = None if named else methods.create_optimizer()
    groups = with_parameters(make_parameter_groups(args, model, methods.get_decay_parameter_names(model)), model)
    groups = [group for group in groups if group["params"]]
    engine = initialize(model, config, args.device, optimizer=optimizer, groups=groups if named else None)
    if named:
        optimizer = engine.basic_optimizer
    own_schedule = "scheduler" in config
    scheduler = engine.lr_scheduler if own_schedule else methods.create_scheduler(plan.total_steps, optimizer)
    return attrs.evolve(
        chosen,
        optimizer=optimizer,
        scheduler=scheduler,
        steps_scheduler=not own_schedule,
        initial_settings=group_settings(optimizer),
        engine=engine,
    )


def check_unpartitioned(model: nn.Module, engine: Any) -> None:
    """Raise ArgumentError where an engine of an earlier run has partitioned the model."""
    if is_partitioned(model) and engine is not None:
        raise ArgumentError(
            "train() was called again on a model that ZeRO's stage 3 partitioned for the run before. Make a new Trainer "
            "with a new model, or pass model_init=."
        )


def fill_config(args: TrainingArguments, world_size: int, batch_size: int, auto_find_batch_size: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration with what the arguments say.

    Args:
        args: `deepspeed`, and what it leaves to the others.
        world_size: how many ranks have batches of their own.
        batch_size: examples in a micro-batch.
        auto_find_batch_size: let the arguments win where batch sizes differ.

    Raises:
        ArgumentError: it says something else than the arguments, or there is none.
    """
    config = load_deepspeed_config(args.deepspeed, os.environ)
    if config is None:
        raise ArgumentError("There is no configuration of DeepSpeed to fill in: give TrainingArguments(deepspeed=...).")
    return fill_deepspeed_config(config, args, world_size, batch_size=batch_size, auto_find_batch_size=auto_find_batch_size)


def hidden_size(model: nn.Module) -> int | None:
    """The width of a transformers model, the greatest where it has several; None where its configuration has none.

    >>> hidden_size(nn.Linear(1, 1)) is None
    True
    """
    config: Any = getattr(base_model(model), "config", None)
    for part in (config, getattr(config, "text_config", None)):
        sizes = getattr(part, "hidden_size", None) or getattr(part, "hidden_sizes", None)
        if sizes:
            return int(max(sizes) if isinstance(sizes, (list, tuple)) else sizes)
    return None
