"""Proxies of the optimizer and the schedule: torch objects for scripts and callbacks, which read the training state.

They compute nothing: `step` is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.optimization.optimizer_classes import optimizer_and_groups
from fts.trainer.optimization.parameter_groups import with_parameters
from fts.typing import OptState, Schedule

ReadState = Callable[[], OptState]
"""Returns the optimizer's current state, or None before there is one."""


class OptimizerProxy(torch.optim.Optimizer):
    """A torch optimizer that stands for a transform and its state.

    `param_groups` holds the model's Parameters, the rate of the next update and the other hyper-parameters; `state` and
    `state_dict()` have torch's form and are read from the transform's state. `zero_grad` works. `changes` returns what was
    written into the groups.

    Args:
        model: names and Parameters.
        groups: `[{"params": names, "lr": number, **options}, ...]`.
        read_state: returns the transform's state, or None.

    >>> proxy = OptimizerProxy(nn.Linear(2, 1), [{"params": ["weight", "bias"], "lr": 0.1}], lambda: None)
    >>> proxy.set_lr(0.05)
    >>> proxy.param_groups[0]["lr"], proxy.param_groups[0]["initial_lr"], dict(proxy.state)
    (0.05, 0.1, {})
    """

    def __init__(self, model: nn.Module, groups: Sequence[Mapping[str, Any]], read_state: ReadState) -> None:
        self.read_state = read_state
        self._named = dict(model.named_parameters())
        self._accepted: list[dict[str, Any]] | None = None
        made = with_parameters(groups, model)
        for group in made:
            group.setdefault("initial_lr", group["lr"])
        super().__init__(made, {key: value for key, value in made[0].items() if key not in ("params", "initial_lr")})
        self.accept_changes()

    def set_lr(self, lr: float) -> None:
        """Set the rate of the next update in all groups, each in its relation to the first group's `initial_lr`.

        Args:
            lr: that of the first group.
        """
        base = self.param_groups[0]["initial_lr"]
        for group, accepted in zip(self.param_groups, self._accepted or [], strict=True):
            own = group["initial_lr"]
            group["lr"] = accepted["lr"] = lr if own == base or not base else lr * own / base

    def changes(self) -> dict[int, dict[str, Any]] | None:
        """What was written into the groups since the last `set_lr` or `accept_changes`.

        Returns:
            By the group's index the new values by name; None if there are none.
        """
        found: dict[int, dict[str, Any]] = {}
        for index, (group, accepted) in enumerate(zip(self.param_groups, self._accepted or [], strict=True)):
            for key, value in group.items():
                if key != "params" and value is not accepted.get(key) and (key not in accepted or value != accepted[key]):
                    found.setdefault(index, {})[key] = value
        return found or None

    def accept_changes(self) -> None:
        """Accept the groups as they are: `changes` then returns what is written from now on."""
        self._accepted = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]

    @property
    def state(self) -> Any:
        """The state of torch's optimizer, by Parameter: a new mapping with the training state's tensors."""
        opt_state = self.read_state()
        moments = {} if opt_state is None else tx.torch_moments(opt_state)
        found = {self._named[name]: entry for name, entry in moments.items() if name in self._named}
        return MappingProxyType(found)  # read-only: the tensors are those of the training state

    @state.setter
    def state(self, value: Any) -> None:
        if value:  # torch's base class sets an empty one
            raise ArgumentError(
                "The optimizer's state is part of the training state and cannot be set; resume from a checkpoint."
            )

    def step(self, closure: Any = None) -> NoReturn:
        """Raise: the Trainer's step updates the weights."""
        raise ArgumentError(
            "optimizer.step() of this proxy would do nothing: the Trainer's functional step updates the weights itself. To "
            "update them in another way pass a torch optimizer, Trainer(optimizers=(optimizer, None)), or a transform, "
            "Trainer(step=transform)."
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise once the proxy is made: the groups of a run are fixed when it begins."""
        if self._accepted is not None:
            raise ArgumentError(
                "add_param_group: the groups of a run are fixed when it begins. Override Trainer.create_optimizer, or pass "
                "Trainer(optimizers=(optimizer, None))."
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Any) -> NoReturn:
        """Raise: the state is part of the training state."""
        raise ArgumentError(
            "load_state_dict: the optimizer's state comes from a checkpoint, Trainer.train(resume_from_checkpoint=path)."
        )


class SchedulerProxy(torch.optim.lr_scheduler.LRScheduler):
    """A torch scheduler that stands for a schedule.

    Args:
        optimizer: the proxy whose groups it is for.
        schedule: the rate of the first group by the number of updates. Where a metric decides, the state has the rate.
        count: returns the number of updates so far.

    >>> proxy = OptimizerProxy(nn.Linear(2, 1), [{"params": ["weight", "bias"], "lr": 0.1}], lambda: None)
    >>> scheduler = SchedulerProxy(proxy, tx.linear_schedule(0.1, 0.0, 4), lambda: 1)
    >>> [round(rate, 3) for rate in scheduler.get_last_lr()], scheduler.last_epoch
    ([0.075], 1)
    """

    def __init__(self, optimizer: OptimizerProxy, schedule: Schedule, count: Callable[[], int]) -> None:
        # without torch's constructor, which takes a first step and patches the optimizer's
        self.optimizer: OptimizerProxy = optimizer
        self.base_lrs: list[float | Tensor] = [group["initial_lr"] for group in optimizer.param_groups]
        self._schedule, self._count = schedule, count

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """The number of updates so far, under torch's name."""
        return self._count()

    def get_last_lr(self) -> list[float | Tensor]:
        """The rate of the next update for each group."""
        state, base = self.optimizer.read_state(), self.base_lrs[0]
        followed = state is not None and tx.steps_on_metric(state)
        rate = float(tx.followed_rate(state) if followed else self._schedule(self.last_epoch))
        return [rate if own == base or not base else rate * own / base for own in self.base_lrs]

    def get_lr(self) -> list[float | Tensor]:
        """As `get_last_lr`."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """What torch's schedulers keep; plain numbers."""
        count = self.last_epoch
        return {"base_lrs": self.base_lrs, "last_epoch": count, "_step_count": count + 1, "_last_lr": self.get_last_lr()}

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: the rate is a function of the updates."""
        raise ArgumentError(
            "lr_scheduler.step() of this proxy would do nothing: the learning rate is a function of the updates so far. For a "
            "schedule of your own pass torch's, Trainer(optimizers=(optimizer, scheduler)), or override Trainer.create_scheduler."
        )

    def load_state_dict(self, state_dict: Any) -> NoReturn:
        """Raise: the count is part of the training state."""
        raise ArgumentError(
            "load_state_dict: the number of updates comes from a checkpoint, Trainer.train(resume_from_checkpoint=path)."
        )


def make_optimizer_proxy(args: TrainingArguments, model: nn.Module, read_state: ReadState) -> OptimizerProxy:
    """A proxy of the optimizer that `make_transform` makes for these arguments.

    Args:
        args: as for `make_transform`.
        model: its Parameters are in the groups.
        read_state: returns the transform's state, or None.

    Returns:
        A proxy with the groups and hyper-parameters of the torch optimizer that `optim` names.

    >>> proxy = make_optimizer_proxy(TrainingArguments(weight_decay=0.1), nn.Linear(2, 1), lambda: None)
    >>> [group["weight_decay"] for group in proxy.param_groups], proxy.param_groups[0]["betas"]
    ([0.1, 0.0], (0.9, 0.999))
    """
    cls, groups, kwargs = optimizer_and_groups(args, model)
    options = {key: value for key, value in kwargs.items() if key != "fused"}  # which would check devices
    made = cls(with_parameters(groups, model), **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shown = [
        {**group, "lr": float(group["lr"]), "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in made.param_groups
    ]
    return OptimizerProxy(model, shown, read_state)
