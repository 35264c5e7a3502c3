"""The progress bar of training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fts.trainer.arguments import best_metric_name, total_train_batch_size
from fts.trainer.callbacks.base import TrainerCallback
from fts.trainer.callbacks.displays import open_display
from fts.trainer.callbacks.printer import format_logs
from fts.trainer.callbacks.progress_state import BAR_METRICS, ProgressState


class ProgressCallback(TrainerCallback):
    """Shows the progress of training, its latest metrics and the time left, and the progress of evaluations and predictions.

    In a terminal that is a bar below the logs, in a notebook a table, and elsewhere lines: with each log, and one a minute where
    there are none. Only the main process shows it. A resumed run continues from its step; the speed is that of this run.

    Args:
        max_str_len: the maximum length of a logged string.
    """

    reads_checkpoints = False
    """`on_save` need not wait until the checkpoint is complete: the display shows only its step."""

    def __init__(self, max_str_len: int = 100) -> None:
        self.max_str_len = max_str_len
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self.current_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Open the display of training at the step where the run begins."""
        close_bars([self])
        self.current_step = state.global_step
        if state.is_world_process_zero:
            step = state.global_step
            self.training_bar = open_display(ProgressState("train", state.max_steps, step, _examples_per_step(args, state), step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Update the display of training."""
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> Any:
        """Open or update the display of an evaluation."""
        if self.prediction_bar is None and state.is_world_process_zero:
            batch_size = getattr(eval_dataloader, "batch_size", None)
            progress = ProgressState("evaluate", _length(eval_dataloader), examples_per_step=batch_size)
            self.prediction_bar = open_display(progress, self.training_bar)
        if self.prediction_bar is not None:
            self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Close the display of the evaluation, and show its result."""
        _close(self, "prediction_bar")
        if self.training_bar is not None and metrics:
            best = best_metric_name(args) if getattr(args, "metric_for_best_model", None) else "eval_loss"
            name = next((name for name in (best, "eval_loss") if name in metrics), None)
            if name is not None:
                self._show_metric(name, f"{format_logs(metrics)[name]} at {state.global_step}")

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the display of the prediction."""
        _close(self, "prediction_bar")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Show the step of the checkpoint."""
        if self.training_bar is not None:
            self._show_metric("saved", f"at {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Show loss, learning rate and gradient norm, and the complete log above them."""
        if self.training_bar is None or not logs:
            return
        _close(self, "prediction_bar")
        latest = format_logs({short: logs[name] for name, short in BAR_METRICS.items() if name in logs})
        self.training_bar.progress.metrics.update({name: str(value) for name, value in latest.items()})
        self.training_bar.log(format_logs(logs, self.max_str_len))
        self.training_bar.show()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the display of training."""
        close_bars([self])

    def _show_metric(self, name: str, text: str) -> None:
        self.training_bar.progress.metrics[name] = text
        self.training_bar.show()


def close_bars(callbacks: Iterable[Any]) -> None:
    """Close all open bars: after an exception no event does.

    Args:
        callbacks: those with a `prediction_bar` or `training_bar`, also transformers' own.
    """
    for callback in callbacks:
        _close(callback, "prediction_bar")
        _close(callback, "training_bar")


def _close(callback: Any, name: str) -> None:
    bar: Any = getattr(callback, name, None)
    if bar is not None and callable(getattr(bar, "close", None)):
        bar.close()
        setattr(callback, name, None)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # an iterable dataset
        return None


def _examples_per_step(args: Any, state: Any) -> int | None:
    """Examples in an update, over all processes."""
    if args is None or not state.train_batch_size:
        return None
    return total_train_batch_size(args, state.train_batch_size)
