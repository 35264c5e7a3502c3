"""Checks of the parts that a Trainer is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fts.errors import ArgumentError
from fts.trainer.arguments import IntervalStrategy, TrainingArguments, check_num_steps
from fts.trainer.run.plan import autocast_precision
from fts.typing import Transform


def check_parts(
    args: Any, model: Any, model_init: Any, eval_dataset: Any, optimizers: Any, optimizer_cls_and_kwargs: Any, step: Any
) -> None:
    """Raise ArgumentError where the parts of a Trainer are missing, or contradict each other."""
    if not isinstance(args, TrainingArguments):
        found = f"{type(args).__module__}.{type(args).__name__}"
        raise ArgumentError(f"Trainer(args=...) must be fts.TrainingArguments, not {found}.")
    if (model is None) == (model_init is None):
        found = "neither" if model is None else "both"
        raise ArgumentError(f"Trainer needs either model or model_init; {found} was given.")
    if model is not None and not isinstance(model, nn.Module):
        raise ArgumentError(f"Trainer(model=...) must be a torch.nn.Module, not {type(model).__name__}.")
    if args.eval_strategy != IntervalStrategy.NO and eval_dataset is None:
        raise ArgumentError(f"eval_strategy='{args.eval_strategy}' needs data to evaluate: Trainer(..., eval_dataset=...).")
    autocast_precision(args)  # an unavailable one is an error now
    config: Any = args.accelerator_config  # parsed: an AcceleratorConfig
    check_num_steps(config.gradient_accumulation_kwargs, args.gradient_accumulation_steps)
    _check_optimizers(model_init, optimizers, optimizer_cls_and_kwargs)
    _check_step(step, optimizers, optimizer_cls_and_kwargs)


def _check_optimizers(model_init: Any, optimizers: Any, optimizer_cls_and_kwargs: Any) -> None:
    if not isinstance(optimizers, (tuple, list)) or len(optimizers) != 2:
        raise ArgumentError("Trainer(optimizers=...) must be a pair (optimizer, scheduler); either may be None.")
    optimizer = optimizers[0]
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(
            f"Trainer(optimizers=...): the optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer. For a "
            "transform use Trainer(step=transform), for a name the argument optim."
        )
    given = any(part is not None for part in optimizers)
    if given and model_init is not None:
        raise ArgumentError(
            "Trainer(optimizers=...) holds parameters of a model, but model_init makes a new one at each train(). Use "
            "optimizer_cls_and_kwargs=, or override create_optimizer."
        )
    if optimizer_cls_and_kwargs is None:
        return
    if given:
        raise ArgumentError("Trainer was given optimizers= and optimizer_cls_and_kwargs=. Give one of them.")
    if not isinstance(optimizer_cls_and_kwargs, (tuple, list)) or len(optimizer_cls_and_kwargs) != 2:
        raise ArgumentError("Trainer(optimizer_cls_and_kwargs=...) must be a pair (class, dictionary of arguments).")


def _check_step(step: Any, optimizers: Any, optimizer_cls_and_kwargs: Any) -> None:
    if step is None or isinstance(step, Transform):
        transform = step
    else:
        transform = getattr(step, "transform", None)
        if not callable(step) or not isinstance(transform, Transform):
            raise ArgumentError(
                f"Trainer(step=...) must be a Transform such as tx.adamw(1e-3), or a step that fts.steps.train_step made; a "
                f"{type(step).__name__} has no `transform`, which makes the optimizer's state. Give your step that attribute."
            )
    if transform is not None and (optimizer_cls_and_kwargs is not None or any(part is not None for part in optimizers)):
        raise ArgumentError("Trainer was given step= and an optimizer. Give one of them: the step has its own.")
