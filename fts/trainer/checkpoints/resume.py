"""Resuming with other arguments: where in the data to go on, and what to tell about the changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs.validators import ge, optional

from fts import loops
from fts.errors import ArgumentError
from fts.loops import Position
from fts.loops.checkpoints import PROGRESS
from fts.loops.history import TRAINER_STATE
from fts.storage import checked, read_document, record
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks.state import TrainerState
from fts.trainer.checkpoints.saving import ARGUMENTS_FILE
from fts.trainer.optimization.schedules import make_schedule
from fts.trainer.run.plan import Plan
from fts.trainer.run.running_metrics import RunningMetrics

UNHEEDED = ("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "seed", "data_seed")
"""Arguments that a comparison leaves out: those that only scripts read, and the seeds, which have lines of their own."""

SHAPING = ("optim", "max_grad_norm", "weight_decay")
"""Arguments that decide which tensors an optimizer's state has."""


@attrs.frozen
class Cut:
    """How the rows of an epoch are cut into updates; checkpoints keep it.

    Attributes:
        batch_size: rows in a micro-batch.
        micro_batches: micro-batches in an update.
        items: rows in an epoch; None where the data does not tell.
        drop_last: whether a last micro-batch that is not full is left out.
        shares: how many workers divide a stream among them, each cutting its share; otherwise 1.
        seed: the seed of the rows' order.
        offset: how many more updates were taken than this cut would have needed to come as far, because another cut came before.
        processes: how many processes have a micro-batch each.
    """

    batch_size: int = attrs.field(validator=ge(1))
    micro_batches: int = attrs.field(validator=ge(1))
    items: int | None = attrs.field(default=None, validator=optional(ge(0)))
    drop_last: bool = False
    shares: int = attrs.field(default=1, validator=ge(1))
    seed: int = 0
    offset: int = 0
    processes: int = attrs.field(default=1, validator=ge(1))

    @property
    def rows(self) -> int:
        """Rows in an update."""
        return self.batch_size * self.micro_batches * self.processes

    @property
    def steps(self) -> int | None:
        """Updates in an epoch; None where the data does not tell."""
        if self.items is None:
            return None
        batches = self.items // self.batch_size if self.drop_last else -(-self.items // self.batch_size)
        return -(-batches // (self.micro_batches * self.processes))

    @property
    def sizes(self) -> tuple[int, ...]:
        """What decides which rows an update has."""
        return self.batch_size, self.micro_batches, self.processes, self.drop_last, self.shares


def convert(position: Position, old: Cut, new: Cut) -> Position:
    """The same place in the rows of an epoch, by another cut.

    Raises:
        ArgumentError: no update of the new cut begins there, so rows would be trained twice or never.

    >>> convert(Position(epoch=1, batch=3), Cut(batch_size=8, micro_batches=1), Cut(batch_size=2, micro_batches=2))
    Position(epoch=1, batch=6)
    """
    if position.batch == 0 or old.sizes == new.sizes:
        return position
    if old.steps is not None and new.steps is not None and position.batch >= old.steps:
        return Position(position.epoch, new.steps)
    rows = position.batch * old.rows
    before = f"per_device_train_batch_size={old.batch_size} and gradient_accumulation_steps={old.micro_batches}"
    if old.processes > 1:
        before += f" in {old.processes} processes"
    if (old.shares, old.batch_size) != (new.shares, new.batch_size) and max(old.shares, new.shares) > 1:
        raise ArgumentError(
            f"The checkpoint is in epoch {position.epoch} of a stream read by {old.shares} worker(s) with {before}; "
            f"dataloader_num_workers={new.shares} with per_device_train_batch_size={new.batch_size} would read its rows in "
            "another order. Set them as they were, or resume from a checkpoint at the end of an epoch."
        )
    if rows % new.rows:
        several = f" times {new.processes} processes" if new.processes > 1 else ""
        raise ArgumentError(
            f"The checkpoint is in epoch {position.epoch} after {rows} rows, where no update of per_device_train_batch_size="
            f"{new.batch_size} times gradient_accumulation_steps={new.micro_batches}{several} begins: rows would be trained "
            f"twice or never. Set sizes whose product divides {rows} (the checkpoint has {before}), or resume from a checkpoint "
            "at the end of an epoch."
        )
    return Position(position.epoch, rows // new.rows)


def cut_of(checkpoint: Path) -> Cut | None:
    """How the data of a checkpoint's run was cut; None where it does not say.

    Raises:
        CheckpointError: what it says is damaged, or this version does not know it.
    """
    values = loops.load_extra(checkpoint).get("cut")
    return None if values is None else record(Cut, values, f'"cut" in {checkpoint / PROGRESS}')


def tally_of(checkpoint: Path) -> RunningMetrics:
    """The figures that a checkpoint's run had read, but not logged.

    Raises:
        CheckpointError: they are damaged, or this version does not know them.
    """
    return record(RunningMetrics, loops.load_extra(checkpoint).get("tally", {}), f'"tally" in {checkpoint / PROGRESS}')


def written_of(checkpoint: Path) -> dict[str, Any]:
    """What callbacks of a checkpoint's run had written into the optimizer's groups.

    Raises:
        CheckpointError: it is damaged.
    """
    hint, where = dict[str, dict[str, Any]], f'"written" in {checkpoint / PROGRESS}'
    found: dict[str, Any] = checked(loops.load_extra(checkpoint).get("written", {}), hint, where)
    checked(found.get("settings", {}), dict[str, float], where)
    checked(found.get("next", {}), dict[str, dict[str, float | bool | list[float] | None]], where)
    return found


def offset_after(step: int, start: Position, old: Cut, new: Cut) -> int:
    """`Cut.offset` of a run that goes on after `step` updates at a place of the new cut."""
    if (old.sizes, old.items) == (new.sizes, new.items) or new.steps is None:
        return old.offset
    return step - start.epoch * new.steps - start.batch


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """The training arguments that a checkpoint was written with; empty if it has none.

    Raises:
        CheckpointError: the file is damaged.
    """
    return read_document(checkpoint, ARGUMENTS_FILE) if (checkpoint / ARGUMENTS_FILE).exists() else {}


def argument_changes(args: TrainingArguments, before: dict[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """How arguments differ from those of a checkpoint, one line each.

    >>> argument_changes(TrainingArguments(learning_rate=0.1), {"learning_rate": 0.2})
    ['learning_rate: 0.1 (from args) != 0.2 (from training_args.json)']
    """
    now = json.loads(json.dumps(args.to_dict(), default=str))
    shown = [name for name in now if name in before and (name in names if names is not None else name not in UNHEEDED)]
    return [_line(name, now[name], before[name], ARGUMENTS_FILE) for name in shown if now[name] != before[name]]


def changes(args: TrainingArguments, plan: Plan, told: TrainerState, before: dict[str, Any]) -> list[str]:
    """All changes that win over a checkpoint; intervals, and the length of the run, are compared as resolved to steps."""
    resolved = {
        "logging_steps": (plan.logging_steps, told.logging_steps),
        "eval_steps": (plan.eval_steps, told.eval_steps),
        "save_steps": (plan.save_steps, told.save_steps),
        "per_device_train_batch_size": (plan.train_batch_size, told.train_batch_size),
    }
    lines = [_line(name, new, old, TRAINER_STATE) for name, (new, old) in resolved.items() if new != old]
    lines += argument_changes(args, {name: value for name, value in before.items() if name not in resolved})
    if told.max_steps not in (0, plan.total_steps):
        lines.append(f"updates of the run: {plan.total_steps} (from args and data) != {told.max_steps} (from {TRAINER_STATE})")
        lines += _stretched(args, plan, told)
    return lines


def _stretched(args: TrainingArguments, plan: Plan, told: TrainerState) -> list[str]:
    """What another length of the run does to the learning rate at the next update."""
    before = make_schedule(args, told.max_steps, args.get_warmup_steps(told.max_steps))
    new, old = float(plan.schedule(told.global_step)), float(before(told.global_step))
    if new == old:
        return []
    return [
        f"learning rate at update {told.global_step}: {new:g}, by {plan.total_steps} updates, != {old:g}, by {told.max_steps}"
    ]


def process_changes(old: Cut, new: Cut) -> list[str]:
    """Where the checkpoint's run had another number of processes.

    >>> process_changes(Cut(batch_size=4, micro_batches=1, processes=2), Cut(batch_size=4, micro_batches=1))
    ['processes: 1 (from this run) != 2 (from checkpoint); an update has 4 rows, where it had 8']
    """
    if old.processes == new.processes:
        return []
    rows = f"; an update has {new.rows} rows, where it had {old.rows}" if old.rows != new.rows else ""
    return [f"processes: {new.processes} (from this run) != {old.processes} (from checkpoint){rows}"]


def seed_changes(args: TrainingArguments, seed: int, data_seed: int) -> list[str]:
    """Where the arguments name other seeds than the run began with."""
    lines = [] if args.seed == seed else [_line("seed", args.seed, seed, "checkpoint")]
    wanted = args.seed if args.data_seed is None else args.data_seed
    if wanted != data_seed and not (args.data_seed is None and data_seed == seed):
        lines.append(_line("data_seed", args.data_seed, data_seed, "checkpoint"))
    return lines


def _line(name: str, new: Any, old: Any, where: str) -> str:
    return f"{name}: {new} (from args) != {old} (from {where})"
