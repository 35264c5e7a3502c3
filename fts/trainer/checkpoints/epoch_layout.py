"""How the examples of an epoch are split into updates, and where in the data a run with other sizes resumes."""

from __future__ import annotations

from pathlib import Path

import attrs
from attrs.validators import ge, optional

from fts import loops
from fts.errors import ArgumentError
from fts.loops import Position
from fts.loops.checkpoints import PROGRESS_NAME
from fts.storage import structure


@attrs.frozen
class EpochLayout:
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


def convert_position(position: Position, old: EpochLayout, new: EpochLayout) -> Position:
    """The same place in the rows of an epoch, by another cut.

    Raises:
        ArgumentError: no update of the new cut begins there, so rows would be trained twice or never.

    >>> convert_position(Position(epoch=1, batch=3), EpochLayout(batch_size=8, micro_batches=1), EpochLayout(batch_size=2, micro_batches=2))
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


def load_epoch_layout(checkpoint: Path) -> EpochLayout | None:
    """How the data of a checkpoint's run was cut; None where it does not say.

    Raises:
        CheckpointError: what it says is damaged, or this version does not know it.
    """
    values = loops.load_extra(checkpoint).get("cut")
    return None if values is None else structure(EpochLayout, values, f'"cut" in {checkpoint / PROGRESS_NAME}')


def step_offset(step: int, start: Position, old: EpochLayout, new: EpochLayout) -> int:
    """`EpochLayout.offset` of a run that goes on after `step` updates at a place of the new cut."""
    if (old.sizes, old.items) == (new.sizes, new.items) or new.steps is None:
        return old.offset
    return step - start.epoch * new.steps - start.batch


def process_changes(old: EpochLayout, new: EpochLayout) -> list[str]:
    """Where the checkpoint's run had another number of processes.

    >>> process_changes(EpochLayout(batch_size=4, micro_batches=1, processes=2), EpochLayout(batch_size=4, micro_batches=1))
    ['processes: 1 (from this run) != 2 (from checkpoint); an update has 4 rows, where it had 8']
    """
    if old.processes == new.processes:
        return []
    rows = f"; an update has {new.rows} rows, where it had {old.rows}" if old.rows != new.rows else ""
    return [f"processes: {new.processes} (from this run) != {old.processes} (from checkpoint){rows}"]
