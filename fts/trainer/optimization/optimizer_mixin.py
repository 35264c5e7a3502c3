"""The methods of the Trainer that make and read its torch optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.optimization.optimizer_classes import optimizer_cls_and_kwargs
from fts.trainer.optimization.parameter_groups import decay_parameter_names, make_parameter_groups, with_parameters
from fts.trainer.optimization.torch_optimizer import make_torch_scheduler


class OptimizerMixin:
    """Makes a torch optimizer and its schedule, and answers questions about them, as Hugging Face's Trainer does."""

    args: TrainingArguments
    model: nn.Module
    optimizer: Any
    lr_scheduler: Any
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Make `optimizer` and `lr_scheduler`, unless they are there; called only where the user's own are asked for."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps, self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make `optimizer`, a torch optimizer of the model's trained parameters, unless it is there."""
        if self.optimizer is None:
            model = self.model if model is None else model
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = make_parameter_groups(self.args, model, self.get_decay_parameter_names(model))
            self.optimizer = cls(**({"params": with_parameters(groups, model)} | kwargs))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make `lr_scheduler`, a torch schedule of the optimizer, unless it is there."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = make_torch_scheduler(optimizer, self.args, num_training_steps)
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """The torch optimizer that `optim` names, and its arguments."""
        return optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The trained parameters that weight decay applies to: all but biases and normalisation weights."""
        decayed = decay_parameter_names(model)
        return [name for name, _ in model.named_parameters() if name in decayed]

    def get_learning_rates(self) -> list[float]:
        """The learning rate of each of the optimizer's groups."""
        return [group["lr"] for group in self._optimizer_groups()]

    def get_optimizer_group(self, param: str | nn.Parameter | None = None) -> Any:
        """The optimizer's group of a parameter, or the parameters of all groups."""
        groups = self._optimizer_groups()
        if param is None:
            return [group["params"] for group in groups]
        wanted = dict(self.model.named_parameters()).get(param) if isinstance(param, str) else param
        return next((group for group in groups if any(other is wanted for other in group["params"])), None)

    def get_num_trainable_parameters(self) -> int:
        """How many numbers are trained."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)

    def _optimizer_groups(self) -> list[dict[str, Any]]:
        if self.optimizer is None:
            raise ArgumentError("Trainer.optimizer is None: it is made by train(), or by create_optimizer() before it.")
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups
