"""What updates the weights: the plan's own transform, or the user's torch optimizer as one."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import attrs
import optree
import torch
from torch import nn

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.messages import some
from fts.state import TrainState
from fts.trainer.arguments import TrainingArguments
from fts.trainer.arguments.choices import SchedulerType
from fts.trainer.evaluation.best_model import metric_of
from fts.trainer.optimization.names import guarded, make_transform, withholding
from fts.trainer.optimization.optimizer_proxy import OptimizerProxy, SchedulerProxy, optimizer_proxy
from fts.trainer.optimization.schedules import make_rate_rule, make_schedule, options_of
from fts.trainer.optimization.torch_settings import group_settings
from fts.trainer.run.checks import check_step_is_of
from fts.trainer.run.nonfinite import check_can_roll_back
from fts.trainer.run.overrides import overridden
from fts.trainer.run.plan import Plan, with_settings
from fts.transforms.loss_scaling import unscales
from fts.typing import Metrics, Schedule, Transform

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

MAKERS = (
    *("create_optimizer", "create_scheduler", "create_optimizer_and_scheduler"),
    *("get_optimizer_cls_and_kwargs", "get_decay_parameter_names"),
)
"""The methods by which a subclass asks for a torch optimizer of its own."""


@attrs.define(eq=False)
class Latest:
    """The state that a view reads, exchanged after each update."""

    state: TrainState | None = None


@attrs.frozen(eq=False)
class Optimizing:
    """The optimizer of a run, as the step and as scripts see it.

    Attributes:
        transform: what the step runs.
        optimizer: a torch optimizer: a view of the transform's state, or the one that the transform runs.
        scheduler: a torch schedule: a view of the plan's, or the one that sets the optimizer's rates.
        steps: whether the schedule is a torch one, which has to be told of each update.
        rule: how evaluations move the rate of the transform, if they do.
        latest: what views read.
        schedule: the rate by update; None where the optimizer itself knows.
        before: the settings of a torch optimizer's groups when the run began.
        engine: DeepSpeed's, which takes the steps; None for fts's own.
    """

    transform: Transform
    optimizer: Any
    scheduler: Any
    steps: bool = False
    rule: Any = None
    latest: Latest = attrs.Factory(Latest)
    schedule: Schedule | None = None
    before: list[dict[str, Any]] = attrs.Factory(list)
    engine: Any = None

    @property
    def needs_metric(self) -> bool:
        """Whether evaluations move the learning rate."""
        return self.rule is not None or follows_metric(self.scheduler)

    def advance(self, state: TrainState, step: int, metrics: Metrics) -> None:
        """Let a torch schedule step, unless the update was skipped, or the views show the rate of the next update."""
        self.latest.state = state
        if not self.steps:
            if isinstance(self.optimizer, OptimizerProxy) and self.schedule is not None:
                self.optimizer.show(self.schedule(step))
        elif not follows_metric(self.scheduler) and not int(metrics.get("skipped", 0)):
            self.scheduler.step()

    def observe(self, args: TrainingArguments, state: TrainState, metrics: dict[str, float]) -> None:
        """Let an evaluation move the rate; the state, which belongs to the run, is written in place."""
        metric = metric_of(args, metrics)
        if self.rule is None:
            self.scheduler.step(metric)
            return
        after = tx.update_on_metric(state.opt_state, metric, self.rule)
        for old, new in zip(optree.tree_leaves(state.opt_state), optree.tree_leaves(after), strict=True):
            if old is not new:
                old.copy_(new)
        self.optimizer.show(float(tx.followed_rate(state.opt_state)))


def choose(trainer: Trainer, plan: Plan) -> Optimizing:
    """What updates the weights: the user's step, the user's torch optimizer, or the plan's transform.

    Args:
        trainer: says what the user asks for; its methods make the user's optimizer.
        plan: the schedule.
    """
    args, model = trainer.args, trainer.model
    _check_widths(args, model)
    if trainer.step is not None:
        check_step_is_of(trainer.step, model)
        if isinstance(trainer.step, Transform):
            return Optimizing(withholding(args, trainer.step), None, None)
        if args.nonfinite == "skip":
            raise ArgumentError(
                "nonfinite='skip' cannot get into a whole step of your own: Trainer(step=...). Make that step with "
                "tx.skip_nonfinite(...) around its transform, or give the Trainer the transform alone."
            )
        if args.mixed_precision == "fp16" and not unscales(trainer.step.transform):
            raise ArgumentError(
                "fp16=True cannot get into a whole step of your own: Trainer(step=...). Make that step with precision='fp16' and "
                "tx.dynamic_loss_scale(...) around its transform, or give the Trainer the transform alone."
            )
        return Optimizing(trainer.step.transform, None, None)
    given = trainer.optimizer is not None or trainer.lr_scheduler is not None
    if given or trainer.optimizer_cls_and_kwargs is not None or overridden(trainer, *MAKERS):
        trainer.create_optimizer_and_scheduler(plan.total_steps)
        check_can_roll_back(args, torch_schedule=trainer.lr_scheduler is not None)
        transform = bridged(trainer.optimizer, model, args)
        before = group_settings(trainer.optimizer)
        return Optimizing(transform, trainer.optimizer, trainer.lr_scheduler, steps=True, before=before)
    transform = make_transform(args, plan.schedule, model, total_steps=plan.total_steps)
    rule, latest = make_rate_rule(args), Latest()
    optimizer = optimizer_proxy(args, model, lambda: None if latest.state is None else latest.state.opt_state)
    count = lambda: 0 if latest.state is None else int(latest.state.step)  # noqa: E731
    scheduler = SchedulerProxy(optimizer, plan.schedule, count)
    optimizer.show(plan.schedule(0))
    schedule = None if rule is not None else plan.schedule
    return Optimizing(transform, optimizer, scheduler, rule=rule, latest=latest, schedule=schedule)


def _check_widths(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ArgumentError where gradients in float16 would vanish when they are unscaled."""
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if narrow and args.mixed_precision == "fp16":
        raise ArgumentError(
            f"fp16=True computes in float16 and keeps the trained weights in float32, but {some(narrow)} are in float16. Load "
            "the model in float32 (from_pretrained(..., dtype=torch.float32), or model.float())."
        )


def rewritten(changed: dict[int, dict[str, Any]], filled: Collection[int] = ()) -> tuple[dict[str, Any], float | None]:
    """What was written into a view's groups: arguments that last, by name, and the learning rate of the next update.

    Args:
        changed: by the group's index, the new values by name.
        filled: the groups that have parameters; a new rate must be that of all of them.

    Raises:
        ArgumentError: fts's own optimizer has no such setting for that group.

    >>> rewritten({0: {"weight_decay": 0.1, "lr": 0.5}, 1: {"lr": 0.5}})
    ({'weight_decay': 0.1}, 0.5)
    """
    values: dict[str, Any] = {}
    rates = {group["lr"] for group in changed.values() if "lr" in group}
    for index, group in changed.items():
        for name, value in group.items():
            if name == "weight_decay" and index == 0:
                values["weight_decay"] = value
            elif name == "betas":
                values["adam_beta1"], values["adam_beta2"] = value
            elif name == "eps":
                values["adam_epsilon"] = value
            elif name != "lr":
                raise _cannot_change(index, name, value)
    silent = [index for index in filled if "lr" not in changed.get(index, {})]
    if len(rates) > 1 or (rates and silent):
        raise _cannot_change(0, "lr", sorted(rates))
    return values, next(iter(rates), None)


def _cannot_change(index: int, name: str, value: Any) -> ArgumentError:
    return ArgumentError(
        f"optimizer.param_groups[{index}][{name!r}] = {value!r} cannot be given to fts's own optimizer while it runs: it takes "
        "one lr for all groups, betas, eps, and the weight_decay of the first group. For anything else override "
        "create_optimizer, which makes a torch optimizer."
    )


def bridged(optimizer: Any, model: nn.Module, args: TrainingArguments) -> Transform:
    """A torch optimizer, behind clipping, as the transform of a run.

    Args:
        optimizer: holds Parameters of the model.
        model: its trained parameters become the state.
        args: `max_grad_norm`.

    Raises:
        ArgumentError: it is no torch optimizer, or holds none of the model's parameters.
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
            f"The optimizer {type(optimizer).__name__} holds none of the parameters of {type(model).__name__}: nothing would be "
            "trained. Make it of the model that the Trainer is given; with model_init, use optimizer_cls_and_kwargs= instead."
        )
    return guarded(args, tx.from_torch(optimizer, parameters=parameters))


def torch_scheduler(optimizer: Any, args: TrainingArguments, total_steps: int) -> Any:
    """The schedule that the arguments ask for, as a torch one that sets the rates of an optimizer's groups."""
    rule = make_rate_rule(args)
    if rule is not None:
        return _torch_rule(optimizer, args)
    peak = float(optimizer.defaults.get("lr", args.learning_rate))  # which shapes with a lowest rate of their own begin from
    schedule = make_schedule(with_settings(args, learning_rate=peak), total_steps, args.get_warmup_steps(total_steps))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(schedule(step)) / peak if peak else 0.0)


def _torch_rule(optimizer: Any, args: TrainingArguments) -> Any:
    if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options_of(args))
    raise ArgumentError(
        f"lr_scheduler_type='{args.lr_scheduler_type}' cannot drive a torch optimizer of your own. Pass its schedule too: "
        "Trainer(optimizers=(optimizer, scheduler))."
    )


def follows_metric(scheduler: Any) -> bool:
    """Whether a torch schedule steps by the metric of an evaluation.

    >>> follows_metric(None)
    False
    """
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"
