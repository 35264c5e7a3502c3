"""Checkpoints of a run: what is saved and when, which one to resume from, and what changed since.

It reads the checkpoints of transformers' Trainer, too. It may use `fts.trainer.evaluation` and what is below it.
"""

from fts.trainer.checkpoints.argument_changes import (
    STATE_ARGUMENTS,
    changed_arguments,
    list_changes,
    load_arguments,
    seed_changes,
)
from fts.trainer.checkpoints.checkpoint_files import CheckpointContents, check_output_dir, save_checkpoint, saves_checkpoints
from fts.trainer.checkpoints.epoch_layout import EpochLayout, convert_position, load_epoch_layout, process_changes, step_offset
from fts.trainer.checkpoints.extra_state import load_group_changes, load_running_metrics
from fts.trainer.checkpoints.from_transformers import log_report, read_transformers_checkpoint, transformers_step_offset
from fts.trainer.checkpoints.lookup import find_checkpoint
from fts.trainer.checkpoints.manager import CheckpointedRun, CheckpointHooks, CheckpointManager, remaining_time
from fts.trainer.checkpoints.model_files import save_model
from fts.trainer.checkpoints.train_state import load_best_model, load_train_state
from fts.trainer.checkpoints.transformers_files import is_transformers_checkpoint

__all__ = [
    "STATE_ARGUMENTS",
    "CheckpointContents",
    "CheckpointHooks",
    "CheckpointManager",
    "CheckpointedRun",
    "EpochLayout",
    "changed_arguments",
    "check_output_dir",
    "convert_position",
    "find_checkpoint",
    "is_transformers_checkpoint",
    "list_changes",
    "load_arguments",
    "load_best_model",
    "load_epoch_layout",
    "load_group_changes",
    "load_running_metrics",
    "load_train_state",
    "log_report",
    "process_changes",
    "read_transformers_checkpoint",
    "remaining_time",
    "save_checkpoint",
    "save_model",
    "saves_checkpoints",
    "seed_changes",
    "step_offset",
    "transformers_step_offset",
]
