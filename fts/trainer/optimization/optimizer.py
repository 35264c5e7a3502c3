"""The optimizer of a run: the transform that updates the weights, and the torch objects that stand for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import optree
import torch
from torch import nn

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.messages import abbreviate
from fts.state import TrainState
from fts.trainer.arguments import Plan, TrainingArguments
from fts.trainer.optimization.checks import check_rollback, check_step_model
from fts.trainer.optimization.optimizer_proxy import OptimizerProxy, SchedulerProxy, make_optimizer_proxy
from fts.trainer.optimization.schedules import make_metric_rule
from fts.trainer.optimization.torch_optimizer import steps_on_metric, transform_from_torch
from fts.trainer.optimization.torch_state import group_settings
from fts.trainer.optimization.transform import make_transform, with_update_skipping
from fts.transforms.loss_scaling import unscales
from fts.typing import Metrics, Schedule, Transform

OPTIMIZER_METHODS = (
    *("create_optimizer", "create_scheduler", "create_optimizer_and_scheduler"),
    *("get_optimizer_cls_and_kwargs", "get_decay_parameter_names"),
)
"""The Trainer's methods that a subclass overrides to make a torch optimizer."""


@attrs.define(eq=False)
class LatestState:
    """The state that proxies read, replaced after each update."""

    state: TrainState | None = None


@attrs.frozen(eq=False)
class RunOptimizer:
    """The optimizer of a run, as the step and as scripts see it.

    Attributes:
        transform: what the step runs.
        optimizer: a torch optimizer: a proxy of the transform's state, or the one that the transform runs.
        scheduler: a torch scheduler: a proxy of the plan's schedule, or the one that sets the optimizer's rates.
        steps_scheduler: whether the scheduler is a torch one, which steps after each update.
        metric_rule: how the metric of evaluations changes the rate of the transform, if it does.
        latest: what proxies read.
        schedule: the rate by update; None where the optimizer sets its rate.
        initial_settings: the settings of a torch optimizer's groups when the run began.
        engine: DeepSpeed's, which takes the steps; None for fts's own.
    """

    transform: Transform
    optimizer: Any
    scheduler: Any
    steps_scheduler: bool = False
    metric_rule: Any = None
    latest: LatestState = attrs.Factory(LatestState)
    schedule: Schedule | None = None
    initial_settings: list[dict[str, Any]] = attrs.Factory(list)
    engine: Any = None

    @property
    def needs_metric(self) -> bool:
        """Whether the metric of evaluations changes the learning rate."""
        return self.metric_rule is not None or steps_on_metric(self.scheduler)

    def after_update(self, state: TrainState, step: int, metrics: Metrics) -> None:
        """Step a torch scheduler, unless the update was skipped; or set the rate of the next update in the proxy."""
        self.latest.state = state
        if not self.steps_scheduler:
            if isinstance(self.optimizer, OptimizerProxy) and self.schedule is not None:
                self.optimizer.set_lr(self.schedule(step))
        elif not steps_on_metric(self.scheduler) and not int(metrics.get("skipped", 0)):
            self.scheduler.step()

    def step_on_metric(self, state: TrainState, metric: float) -> None:
        """Let the metric of an evaluation change the rate; the state, which belongs to the run, is written in place."""
        if self.metric_rule is None:
            self.scheduler.step(metric)
            return
        after = tx.update_on_metric(state.opt_state, metric, self.metric_rule)
        for old, new in zip(optree.tree_leaves(state.opt_state), optree.tree_leaves(after), strict=True):
            if old is not new:
                old.copy_(new)
        self.optimizer.set_lr(float(tx.followed_rate(state.opt_state)))


def make_optimizer(
    args: TrainingArguments,
    model: nn.Module,
    plan: Plan,
    *,
    step: Any = None,
    create: Callable[[int], tuple[Any, Any]] | None = None,
) -> RunOptimizer:
    """Make the optimizer of a run: of the user's step, of the user's torch optimizer, or of the arguments.

    Args:
        args: the arguments.
        model: its trained parameters are updated.
        plan: the schedule, and the number of updates.
        step: the user's transform, or the user's step, which has a transform.
        create: `(total_steps) -> (optimizer, scheduler)` makes the user's torch optimizer; None where there is none.

    Raises:
        ArgumentError: the arguments ask for what that optimizer cannot do.
    """
    _check_parameter_dtypes(args, model)
    if step is not None:
        return _from_step(args, model, step)
    if create is not None:
        torch_optimizer, torch_scheduler = create(plan.total_steps)
        check_rollback(args, torch_schedule=torch_scheduler is not None)
        transform, initial = transform_from_torch(torch_optimizer, model, args), group_settings(torch_optimizer)
        return RunOptimizer(transform, torch_optimizer, torch_scheduler, steps_scheduler=True, initial_settings=initial)
    transform = make_transform(args, plan.schedule, model, total_steps=plan.total_steps)
    rule, latest = make_metric_rule(args), LatestState()
    optimizer = make_optimizer_proxy(args, model, lambda: None if latest.state is None else latest.state.opt_state)
    count = lambda: 0 if latest.state is None else int(latest.state.step)  # noqa: E731
    scheduler = SchedulerProxy(optimizer, plan.schedule, count)
    optimizer.set_lr(plan.schedule(0))
    schedule = None if rule is not None else plan.schedule
    return RunOptimizer(transform, optimizer, scheduler, metric_rule=rule, latest=latest, schedule=schedule)


def _from_step(args: TrainingArguments, model: nn.Module, step: Any) -> RunOptimizer:
    check_step_model(step, model)
    if isinstance(step, Transform):
        return RunOptimizer(with_update_skipping(args, step), None, None)
    if args.nonfinite == "skip":
        raise ArgumentError(
            "nonfinite='skip' cannot be added to a complete step of your own: Trainer(step=...). Make that step with "
            "tx.skip_nonfinite(...) around its transform, or give the Trainer the transform alone."
        )
    if args.mixed_precision == "fp16" and not unscales(step.transform):
        raise ArgumentError(
            "fp16=True cannot be added to a complete step of your own: Trainer(step=...). Make that step with precision='fp16' "
            "and tx.dynamic_loss_scale(...) around its transform, or give the Trainer the transform alone."
        )
    return RunOptimizer(step.transform, None, None)


def _check_parameter_dtypes(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ArgumentError where gradients in float16 would vanish when they are unscaled."""
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if narrow and args.mixed_precision == "fp16":
        raise ArgumentError(
            f"fp16=True computes in float16 and keeps the trained weights in float32, but {abbreviate(narrow)} are in float16. "
            "Load the model in float32 (from_pretrained(..., dtype=torch.float32), or model.float())."
        )
