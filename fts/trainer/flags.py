"""What the control flags ask of the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer


class Wanted:
    """What is due, read from the control flags at the moment when the loop asks for it.

    The loop asks in its order (log, evaluate, save, stop), and callbacks may change a flag in between: an evaluation that
    stops early, or one whose metric asks for a checkpoint.

    Args:
        trainer: has the flags.
        read: whether the figures are read anyway: at the end, or where a copy of the state is kept.
    """

    def __init__(self, trainer: Trainer, read: bool) -> None:
        self.trainer = trainer
        self.read = read

    @property
    def log(self) -> bool:
        """Read the loop's figures: to log them, or before anything that may save, or at the end for the mean loss."""
        control = self.trainer.control
        return self.read or control.should_log or control.should_evaluate or control.should_save

    @property
    def evaluate(self) -> bool:
        """Evaluate."""
        return self.trainer.control.should_evaluate

    @property
    def save(self) -> bool:
        """Write a checkpoint."""
        return self.trainer.control.should_save

    @property
    def stop(self) -> bool:
        """End the run."""
        return self.trainer.control.should_training_stop

    @property
    def end_epoch(self) -> bool:
        """End the epoch."""
        return self.trainer.control.should_epoch_stop
