"""Which arguments differ between a checkpoint and the run that resumes from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fts.loops.trainer_state import TRAINER_STATE_NAME
from fts.storage import read_json
from fts.trainer.arguments import Plan, TrainingArguments
from fts.trainer.callbacks import TrainerState
from fts.trainer.checkpoints.model_files import ARGUMENTS_FILE
from fts.trainer.optimization import make_schedule

IGNORED_ARGUMENTS = ("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "seed", "data_seed")
"""Arguments that are not compared: those that only scripts read, and the seeds, which `seed_changes` compares."""

STATE_ARGUMENTS = ("optim", "max_grad_norm", "weight_decay")
"""Arguments that decide which tensors the optimizer's state has."""


def load_arguments(checkpoint: Path) -> dict[str, Any]:
    """The training arguments that a checkpoint was written with; empty if it has none.

    Raises:
        CheckpointError: the file is corrupt.
    """
    return read_json(checkpoint, ARGUMENTS_FILE) if (checkpoint / ARGUMENTS_FILE).exists() else {}


def changed_arguments(args: TrainingArguments, before: dict[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """How arguments differ from those of a checkpoint, one line each.

    >>> changed_arguments(TrainingArguments(learning_rate=0.1), {"learning_rate": 0.2})
    ['learning_rate: 0.1 (from args) != 0.2 (from training_args.json)']
    """
    now = json.loads(json.dumps(args.to_dict(), default=str))
    shown = [name for name in now if name in before and (name in names if names is not None else name not in IGNORED_ARGUMENTS)]
    return [_change_line(name, now[name], before[name], ARGUMENTS_FILE) for name in shown if now[name] != before[name]]


def list_changes(args: TrainingArguments, plan: Plan, trainer_state: TrainerState, before: dict[str, Any]) -> list[str]:
    """All changes that override a checkpoint; intervals and the length of the run are compared in steps."""
    resolved = {
        "logging_steps": (plan.logging_steps, trainer_state.logging_steps),
        "eval_steps": (plan.eval_steps, trainer_state.eval_steps),
        "save_steps": (plan.save_steps, trainer_state.save_steps),
        "per_device_train_batch_size": (plan.train_batch_size, trainer_state.train_batch_size),
    }
    lines = [_change_line(name, new, old, TRAINER_STATE_NAME) for name, (new, old) in resolved.items() if new != old]
    lines += changed_arguments(args, {name: value for name, value in before.items() if name not in resolved})
    if trainer_state.max_steps not in (0, plan.total_steps):
        lines.append(
            f"updates of the run: {plan.total_steps} (from args and data) "
            f"!= {trainer_state.max_steps} (from {TRAINER_STATE_NAME})"
        )
        lines += _learning_rate_change(args, plan, trainer_state)
    return lines


def _learning_rate_change(args: TrainingArguments, plan: Plan, trainer_state: TrainerState) -> list[str]:
    """How another length of the run changes the learning rate of the next update."""
    before = make_schedule(args, trainer_state.max_steps, args.get_warmup_steps(trainer_state.max_steps))
    new, old = float(plan.schedule(trainer_state.global_step)), float(before(trainer_state.global_step))
    if new == old:
        return []
    return [
        f"learning rate at update {trainer_state.global_step}: {new:g}, by {plan.total_steps} updates, "
        f"!= {old:g}, by {trainer_state.max_steps}"
    ]


def seed_changes(args: TrainingArguments, seed: int, data_seed: int) -> list[str]:
    """Seeds in the arguments that differ from those that the run began with."""
    lines = [] if args.seed == seed else [_change_line("seed", args.seed, seed, "checkpoint")]
    wanted = args.seed if args.data_seed is None else args.data_seed
    if wanted != data_seed and not (args.data_seed is None and data_seed == seed):
        lines.append(_change_line("data_seed", args.data_seed, data_seed, "checkpoint"))
    return lines


def _change_line(name: str, new: Any, old: Any, where: str) -> str:
    return f"{name}: {new} (from args) != {old} (from {where})"
