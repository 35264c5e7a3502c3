"""The user's torch optimizer as a transform, and torch schedulers made from the arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.trainer.arguments import SchedulerType, TrainingArguments, with_settings
from fts.trainer.optimization.schedules import make_metric_rule, make_schedule, scheduler_kwargs
from fts.trainer.optimization.transform import with_clipping
from fts.typing import Transform


def transform_from_torch(optimizer: Any, model: nn.Module, args: TrainingArguments) -> Transform:
    """A torch optimizer with gradient clipping as the transform of a run.

    Args:
        optimizer: has Parameters of the model.
        model: its trained parameters become the state.
        args: `max_grad_norm`.

    Raises:
        ArgumentError: it is no torch optimizer, or has none of the model's parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(
            f"The optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer. For a transform of your own use "
            "Trainer(step=transform)."
        )
    parameters = dict(model.named_parameters())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters.values()):
        raise ArgumentError(
            f"The optimizer {type(optimizer).__name__} has none of the parameters of {type(model).__name__}: nothing would be "
            "trained. Make it of the model that the Trainer is given; with model_init, use optimizer_cls_and_kwargs= instead."
        )
    return with_clipping(args, tx.from_torch(optimizer, parameters=parameters))


def make_torch_scheduler(optimizer: Any, args: TrainingArguments, total_steps: int) -> Any:
    """The schedule of the arguments as a torch scheduler, which sets the rates of an optimizer's groups."""
    rule = make_metric_rule(args)
    if rule is not None:
        return _make_plateau_scheduler(optimizer, args)
    peak = float(optimizer.defaults.get("lr", args.learning_rate))  # from which schedules with a minimum rate begin
    schedule = make_schedule(with_settings(args, learning_rate=peak), total_steps, args.get_warmup_steps(total_steps))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(schedule(step)) / peak if peak else 0.0)


def _make_plateau_scheduler(optimizer: Any, args: TrainingArguments) -> Any:
    if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **scheduler_kwargs(args))
    raise ArgumentError(
        f"lr_scheduler_type='{args.lr_scheduler_type}' cannot be used with a torch optimizer of your own. Pass its scheduler, "
        "too: Trainer(optimizers=(optimizer, scheduler))."
    )


def steps_on_metric(scheduler: Any) -> bool:
    """Whether a torch scheduler steps by the metric of an evaluation.

    >>> steps_on_metric(None)
    False
    """
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"
