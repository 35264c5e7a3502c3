"""Optimizers and learning rate schedules by the names that transformers has for them, as transforms and as torch objects.

It may use `fts.trainer.arguments`, and `fts.trainer.model`.
"""

from fts.trainer.optimization.group_changes import parse_group_changes
from fts.trainer.optimization.optimizer import OPTIMIZER_METHODS, RunOptimizer, make_optimizer
from fts.trainer.optimization.optimizer_classes import optimizer_cls_and_kwargs
from fts.trainer.optimization.optimizer_mixin import OptimizerMixin
from fts.trainer.optimization.optimizer_proxy import OptimizerProxy
from fts.trainer.optimization.parameter_groups import decay_parameter_names, make_parameter_groups, with_parameters
from fts.trainer.optimization.schedules import make_schedule
from fts.trainer.optimization.torch_optimizer import make_torch_scheduler
from fts.trainer.optimization.torch_state import group_settings, load_torch_state_dict, torch_state_dict
from fts.trainer.optimization.transform import make_transform

__all__ = [
    "OPTIMIZER_METHODS",
    "OptimizerMixin",
    "OptimizerProxy",
    "RunOptimizer",
    "decay_parameter_names",
    "group_settings",
    "load_torch_state_dict",
    "make_optimizer",
    "make_parameter_groups",
    "make_schedule",
    "make_torch_scheduler",
    "make_transform",
    "optimizer_cls_and_kwargs",
    "parse_group_changes",
    "torch_state_dict",
    "with_parameters",
]
