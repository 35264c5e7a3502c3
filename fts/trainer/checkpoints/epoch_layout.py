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
    """How the examples of an epoch are split into updates; its fields are keys of a checkpoint.

    Attributes:
        batch_size: examples in a micro-batch.
        micro_batches: micro-batches in an update.
        items: examples in an epoch; None where the length of the data is unknown.
        drop_last: whether a last micro-batch that is not full is dropped.
        shares: how many workers divide an iterable dataset, each batching its own shard; otherwise 1.
        seed: the seed of the order of the data.
        offset: how many more updates were taken than with this layout alone, because an earlier layout was another one.
        processes: how many ranks have a micro-batch each.
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
    def examples_per_update(self) -> int:
        """Examples in an update."""
        return self.batch_size * self.micro_batches * self.processes

    @property
    def updates_per_epoch(self) -> int | None:
        """Updates in an epoch; None where the length of the data is unknown."""
        if self.items is None:
            return None
        batches = self.items // self.batch_size if self.drop_last else -(-self.items // self.batch_size)
        return -(-batches // (self.micro_batches * self.processes))

    @property
    def sizes(self) -> tuple[int, ...]:
        """What decides which examples an update has."""
        return self.batch_size, self.micro_batches, self.processes, self.drop_last, self.shares


def convert_position(position: Position, old: EpochLayout, new: EpochLayout) -> Position:
    """The same position in the examples of an epoch, in another layout.

    Raises:
        ArgumentError: no update of the new layout begins there, so examples would be trained on twice or never.

    >>> old, new = EpochLayout(batch_size=8, micro_batches=1), EpochLayout(batch_size=2, micro_batches=2)
    >>> convert_position(Position(epoch=1, batch=3), old, new)
    Position(epoch=1, batch=6)
    """
    if position.batch == 0 or old.sizes == new.sizes:
        return position
    if old.updates_per_epoch is not None and new.updates_per_epoch is not None and position.batch >= old.updates_per_epoch:
        return Position(position.epoch, new.updates_per_epoch)
    examples = position.batch * old.examples_per_update
    before = f"per_device_train_batch_size={old.batch_size} and gradient_accumulation_steps={old.micro_batches}"
    if old.processes > 1:
        before += f" in {old.processes} processes"
    if (old.shares, old.batch_size) != (new.shares, new.batch_size) and max(old.shares, new.shares) > 1:
        raise ArgumentError(
            f"The checkpoint is in epoch {position.epoch} of a stream read by {old.shares} worker(s) with {before}; "
            f"dataloader_num_workers={new.shares} with per_device_train_batch_size={new.batch_size} would read its examples in "
            "another order. Set them as they were, or resume from a checkpoint at the end of an epoch."
        )
    if examples % new.examples_per_update:
        several = f" times {new.processes} processes" if new.processes > 1 else ""
        raise ArgumentError(
            f"The checkpoint is in epoch {position.epoch} after {examples} examples, where no update of "
            f"per_device_train_batch_size={new.batch_size} times gradient_accumulation_steps={new.micro_batches}{several} "
            f"begins: examples would be trained on twice or never. Set sizes whose product divides {examples} (the checkpoint "
            f"has {before}), or resume from a checkpoint at the end of an epoch."
        )
    return Position(position.epoch, examples // new.examples_per_update)


def load_epoch_layout(checkpoint: Path) -> EpochLayout | None:
    """The layout in a checkpoint; None where it has none.

    Raises:
        CheckpointError: it is corrupt, or this version does not know it.
    """
    values = loops.load_extra(checkpoint).get("cut")
    return None if values is None else structure(EpochLayout, values, f'"cut" in {checkpoint / PROGRESS_NAME}')


def step_offset(step: int, start: Position, old: EpochLayout, new: EpochLayout) -> int:
    """`EpochLayout.offset` of a run that resumes after `step` updates at a position of the new layout."""
    if (old.sizes, old.items) == (new.sizes, new.items) or new.updates_per_epoch is None:
        return old.offset
    return step - start.epoch * new.updates_per_epoch - start.batch


def process_changes(old: EpochLayout, new: EpochLayout) -> list[str]:
    """The change in the number of processes, if there is one.

    >>> process_changes(EpochLayout(batch_size=4, micro_batches=1, processes=2), EpochLayout(batch_size=4, micro_batches=1))
    ['processes: 1 (from this run) != 2 (from checkpoint); an update has 4 examples, where it had 8']
    """
    if old.processes == new.processes:
        return []
    examples = (
        f"; an update has {new.examples_per_update} examples, where it had {old.examples_per_update}"
        if old.examples_per_update != new.examples_per_update
        else ""
    )
    return [f"processes: {new.processes} (from this run) != {old.processes} (from checkpoint){examples}"]
