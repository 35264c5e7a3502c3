"""The control flags: all-reduced over ranks, and what they make due."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fts.distributed import Group
from fts.trainer.callbacks import TrainerControl
from fts.trainer.run.context import TrainerProtocol

FLAGS = ("should_log", "should_evaluate", "should_save", "should_training_stop", "should_epoch_stop")


def all_reduce_control(control: TrainerControl, group: Group) -> None:
    """Set the control flags that are set on any rank; all ranks must call it.

    Callbacks may decide otherwise on each rank, by what they measure, or because only one of them has the callback; but an
    evaluation or a checkpoint is made by all ranks, or by none.

    Args:
        control: the flags.
        group: the ranks.
    """
    set_anywhere = group.all_reduce(torch.tensor([int(getattr(control, name)) for name in FLAGS])).tolist()
    for name, count in zip(FLAGS, set_anywhere, strict=True):
        setattr(control, name, count > 0)


class DueByControl:
    """What is due, read from the control flags at the moment when the loop asks for it.

    The loop asks in its order (log, evaluate, save, stop), and callbacks may change a flag in between: an evaluation that
    stops early, or one whose metric asks for a checkpoint.

    Args:
        trainer: has the flags.
        read: whether metrics are read in any case: at the end, or where a copy of the state is made.
        agree: makes the flags those of all ranks.
    """

    def __init__(self, trainer: TrainerProtocol, read: bool, agree: Callable[[], None] = lambda: None) -> None:
        self.trainer = trainer
        self.read = read
        self.agree = agree

    @property
    def log(self) -> bool:
        """Read the loop's metrics: to log them, or before anything that may save, or at the end for the mean loss."""
        control = self.trainer.control
        return self.read or control.should_log or control.should_evaluate or control.should_save

    @property
    def evaluate(self) -> bool:
        """Evaluate."""
        self.agree()
        return self.trainer.control.should_evaluate

    @property
    def save(self) -> bool:
        """Write a checkpoint."""
        self.agree()
        return self.trainer.control.should_save

    @property
    def stop(self) -> bool:
        """End the run."""
        self.agree()
        return self.trainer.control.should_training_stop

    @property
    def end_epoch(self) -> bool:
        """End the epoch."""
        self.agree()
        return self.trainer.control.should_epoch_stop
