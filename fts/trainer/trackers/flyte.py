"""Runs inside a Flyte task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fts.trainer.callbacks import TrainerCallback, html_table


class FlyteCallback(TrainerCallback):
    """Shows the logs on the task's deck, and saves its checkpoints to Flyte, from which a retried task resumes.

    Args:
        save_log_history: whether to show the logs.
        sync_checkpoints: whether to save the checkpoints to Flyte.
    """

    def __init__(self, save_log_history: bool = True, sync_checkpoints: bool = True) -> None:
        self.save_log_history = save_log_history
        self.sync_checkpoints = sync_checkpoints

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save the new checkpoint to Flyte."""
        if self.sync_checkpoints and state.is_world_process_zero:
            from flytekit import current_context

            checkpoints = current_context().checkpoint
            if checkpoints is not None:
                checkpoints.save(str(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Show the logs."""
        if self.save_log_history and state.is_world_process_zero:
            from flytekit import Deck

            Deck("Log History", html_table(state.log_history))
