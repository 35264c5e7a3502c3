"""A run whose weights DeepSpeed's engine updates."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from fts import steps
from fts.distributed.deepspeed import DeepSpeedStep, inert, initialize, is_partitioned
from fts.distributed.strategies import DeepSpeed
from fts.errors import ArgumentError
from fts.steps.losses import base_model
from fts.steps.precision import autocast_dtype
from fts.trainer.arguments.deepspeed_config import config_of, filled, settled
from fts.trainer.checkpoints import saving
from fts.trainer.distributed.strategy import strategy_for
from fts.trainer.model.loss import step_loss
from fts.trainer.optimization.names import parameter_groups, with_parameters
from fts.trainer.optimization.optimizer import Optimizing
from fts.trainer.optimization.torch_settings import group_settings
from fts.trainer.run.overrides import overridden
from fts.trainer.run.plan import Plan
from fts.trainer.run.step import Across, items_by, overrides_of, replaced_loss

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)


def check_deepspeed(trainer: Trainer, what: str = "", *, resumes: bool = False) -> None:
    """Raise ArgumentError where a trainer uses DeepSpeed, and what is asked for cannot be had with it.

    Args:
        trainer: says what is asked for.
        what: something else that is asked for.
        resumes: whether a run is to go on from a checkpoint.
    """
    if not isinstance(strategy_for(trainer), DeepSpeed):
        return
    _check_resumes(resumes)
    args = trainer.args
    wrong = {
        "Trainer(step=...)": trainer.step is not None,
        "an overridden training_step": overridden(trainer, "training_step"),
        "torch_compile=True": args.torch_compile,
        f"nonfinite={args.nonfinite!r}": args.nonfinite in ("skip", "rollback"),
        "auto_find_batch_size=True": args.auto_find_batch_size,
        "bf16_full_eval=True": args.bf16_full_eval,
        "fp16_full_eval=True": args.fp16_full_eval,
        what: bool(what),
    }
    for name, asked in wrong.items():
        if asked:
            raise ArgumentError(
                f"{name} cannot be used with deepspeed=: its engine runs the backward pass and the update by itself. Leave it "
                "out, or use fsdp='full_shard'."
            )


def _check_resumes(resumes: bool) -> None:
    if resumes:
        raise ArgumentError(
            "resume_from_checkpoint cannot be used with deepspeed=: its checkpoints have the weights alone. What is missing are "
            "the optimizer's moments, which DeepSpeed would write pickled, and fts pickles nothing. Begin a new run with the "
            "model of a checkpoint: from_pretrained(path); or use fsdp='full_shard', which resumes."
        )


def described(strategy: DeepSpeed, args: Any) -> Optimizing:
    """What updates the weights, as long as no engine is there."""
    named = strategy.config.get("optimizer")
    own = f"{named.get('type')} of its configuration" if isinstance(named, dict) else f"torch optimizer of optim='{args.optim}'"
    clipping = strategy.config.get("gradient_clipping")
    behind = f", gradients clipped to {clipping}" if clipping else ""
    return Optimizing(inert(f"its own update by the {own}{behind}, in the place of fts's transform"), None, None)


def with_engine(trainer: Trainer, plan: Plan, chosen: Optimizing) -> Optimizing:
    """Start DeepSpeed's engine around the trainer's model where it is asked for; elsewhere nothing happens.

    Args:
        trainer: its model becomes the engine's.
        plan: how long the run is.
        chosen: what updates the weights; under DeepSpeed what `described` made.
    """
    if not isinstance(strategy_for(trainer), DeepSpeed):
        return chosen
    args, model = trainer.args, trainer.model
    if is_partitioned(model) and trainer.deepspeed is not None:
        raise ArgumentError(
            "train() was called again on a model that ZeRO's stage 3 has cut into parts for the run before. Make a new Trainer "
            "with a new model, or pass model_init=."
        )
    trainer.propagate_args_to_deepspeed()
    config = settled(trainer.deepspeed_config, args, total_steps=plan.total_steps, hidden_size=hidden_size(model))
    named = "optimizer" in config
    if named and trainer.optimizer is not None:
        raise ArgumentError("deepspeed= names an optimizer, and Trainer(optimizers=...) gives one. Leave one of them out.")
    optimizer = None if named else trainer.create_optimizer()
    groups = with_parameters(parameter_groups(args, model, trainer.get_decay_parameter_names(model)), model)
    groups = [group for group in groups if group["params"]]
    engine = initialize(model, config, args.device, optimizer=optimizer, groups=groups if named else None)
    if named:
        optimizer = engine.basic_optimizer
    own_schedule = "scheduler" in config
    scheduler = engine.lr_scheduler if own_schedule else trainer.create_scheduler(plan.total_steps, optimizer)
    trainer.optimizer, trainer.lr_scheduler = optimizer, scheduler
    trainer.deepspeed = trainer.model_wrapped = engine
    if saving.saves(args) and trainer.is_world_process_zero():
        logger.warning("Checkpoints of a run under DeepSpeed have the weights alone, so that no run can go on from them.")
    return attrs.evolve(
        chosen, optimizer=optimizer, scheduler=scheduler, steps=not own_schedule, before=group_settings(optimizer), engine=engine
    )


def propagated(trainer: Trainer, auto_find_batch_size: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration with what the trainer's arguments say, and the batch size that it uses now.

    Raises:
        ArgumentError: it says something else than the arguments, or there is none.
    """
    args = trainer.args
    config = config_of(args.deepspeed, os.environ)
    if config is None:
        raise ArgumentError("There is no configuration of DeepSpeed to fill in: give TrainingArguments(deepspeed=...).")
    size = trainer._train_batch_size
    return filled(config, args, trainer.group.size, batch_size=size, auto_find_batch_size=auto_find_batch_size)


def deepspeed_step(trainer: Trainer, plan: Plan, strategy: DeepSpeed, chosen: Optimizing) -> Any:
    """The step of training, which the engine takes."""
    replaced, rule = overrides_of(trainer), trainer.loss_rule
    loss = steps.module_loss(trainer.model, step_loss(replaced_loss(rule, replaced), rule))
    dtype = None if replaced.context is not None else autocast_dtype(plan.precision)
    step = DeepSpeedStep(loss, chosen.transform, trainer.group, chosen.engine, dtype, strategy.stage)
    across = Across(trainer.group, trainer.args.average_tokens_across_devices)
    return steps.with_full_batch(step, items_by(rule, trainer.model, across))


def hidden_size(model: nn.Module) -> int | None:
    """The width of a transformers model, the greatest where it has several; None where it does not tell.

    >>> hidden_size(nn.Linear(1, 1)) is None
    True
    """
    config: Any = getattr(base_model(model), "config", None)
    for part in (config, getattr(config, "text_config", None)):
        sizes = getattr(part, "hidden_size", None) or getattr(part, "hidden_sizes", None)
        if sizes:
            return int(max(sizes) if isinstance(sizes, (list, tuple)) else sizes)
    return None
