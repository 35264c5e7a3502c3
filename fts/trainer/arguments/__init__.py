"""TrainingArguments and Seq2SeqTrainingArguments: the settings of a run, their checks, and arithmetic on them.

The lowest package of `fts.trainer`: it may use none of the others.
"""

from fts.trainer.arguments.accelerator_config import AcceleratorConfig, check_num_steps, parse_accelerator_config
from fts.trainer.arguments.argument_names import unknown_name_error
from fts.trainer.arguments.best_metric import best_metric_name, is_better
from fts.trainer.arguments.checks import check_float, check_int, closest_name
from fts.trainer.arguments.conflicts import check_conflicts, sampling_strategy
from fts.trainer.arguments.data_parallel import data_parallel_rank_and_size, num_parallel_batches
from fts.trainer.arguments.deepspeed_config import fill_deepspeed_config, finalize_deepspeed_config, load_deepspeed_config
from fts.trainer.arguments.enums import (
    HPSearchBackend,
    HubStrategy,
    IntervalStrategy,
    OptimizerNames,
    SaveStrategy,
    SchedulerType,
)
from fts.trainer.arguments.log_level import LOG_LEVELS
from fts.trainer.arguments.parsing import TRUE_VALUES, parse_key_values
from fts.trainer.arguments.plan import Plan, eval_dtype, resolve_steps, total_train_batch_size, with_settings
from fts.trainer.arguments.processes import default_group
from fts.trainer.arguments.seed import enable_full_determinism, set_seed
from fts.trainer.arguments.seq2seq_arguments import Seq2SeqTrainingArguments
from fts.trainer.arguments.strategy import resolve_mesh, resolve_strategy
from fts.trainer.arguments.tf32 import apply_tf32
from fts.trainer.arguments.tracker_packages import KUBEFLOW_VARIABLE, resolve_report_to
from fts.trainer.arguments.training_arguments import TrainingArguments

__all__ = [
    "KUBEFLOW_VARIABLE",
    "LOG_LEVELS",
    "TRUE_VALUES",
    "AcceleratorConfig",
    "HPSearchBackend",
    "HubStrategy",
    "IntervalStrategy",
    "OptimizerNames",
    "Plan",
    "SaveStrategy",
    "SchedulerType",
    "Seq2SeqTrainingArguments",
    "TrainingArguments",
    "apply_tf32",
    "best_metric_name",
    "check_conflicts",
    "check_float",
    "check_int",
    "check_num_steps",
    "closest_name",
    "data_parallel_rank_and_size",
    "default_group",
    "enable_full_determinism",
    "eval_dtype",
    "fill_deepspeed_config",
    "finalize_deepspeed_config",
    "is_better",
    "load_deepspeed_config",
    "num_parallel_batches",
    "parse_accelerator_config",
    "parse_key_values",
    "resolve_mesh",
    "resolve_report_to",
    "resolve_steps",
    "resolve_strategy",
    "sampling_strategy",
    "set_seed",
    "total_train_batch_size",
    "unknown_name_error",
    "with_settings",
]
