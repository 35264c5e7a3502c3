"""How far a run is, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fts.trainer.arguments.plan import total_train_batch_size
from fts.trainer.callbacks.base import TrainerCallback
from fts.trainer.callbacks.displays import open_display
from fts.trainer.callbacks.printer import format_logs
from fts.trainer.callbacks.progress_state import (BAR_METRICS, ProgressState)
from fts.trainer.arguments.best_metric import best_metric_name


class ProgressCallback(TrainerCallback):
    """Shows how far training is, its latest figures and the time left, and how far each evaluation or prediction is.

    In a terminal that is a bar below the logs, in a notebook a table, and elsewhere lines: with each log, and one a minute where
    there are none. Only the main process shows anything. A resumed run counts on from its step; its speed is that of this run.

    Args:
        max_str_len: the most characters of a text that is logged.
    """

    reads_checkpoints = False
    """The run need not wait for a checkpoint to be complete before it tells of it: the display shows its step alone."""

    def __init__(self, max_str_len: int = 100) -> None:
        self.max_str_len = max_str_len
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self.current_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Open the display of training, where a resumed run begins."""
        close_bars([self])
        self.current_step = state.global_step
        if state.is_world_process_zero:
            step = state.global_step
            self.training_bar = open_display(ProgressState("train", state.max_steps, step, _examples_per_step(args, state), step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Move it."""
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> Any:
        """Open or move the display of an evaluation."""
        if self.prediction_bar is None and state.is_world_process_zero:
            shown = ProgressState("evaluate", _length(eval_dataloader), rows=getattr(eval_dataloader, "batch_size", None))
            self.prediction_bar = open_display(shown, self.training_bar)
        if self.prediction_bar is not None:
            self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Close the display of the evaluation, and note what came out."""
        _close(self, "prediction_bar")
        if self.training_bar is not None and metrics:
            best = best_metric_name(args) if getattr(args, "metric_for_best_model", None) else "eval_loss"
            name = next((name for name in (best, "eval_loss") if name in metrics), None)
            if name is not None:
                self._note(name, f"{format_logs(metrics)[name]} at {state.global_step}")

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the display of the prediction."""
        _close(self, "prediction_bar")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Note the checkpoint."""
        if self.training_bar is not None:
            self._note("saved", f"at {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Show loss, rate and norm, and the whole log above them."""
        if self.training_bar is None or not logs:
            return
        _close(self, "prediction_bar")
        latest = format_logs({short: logs[name] for name, short in BAR_METRICS.items() if name in logs})
        self.training_bar.shown.figures.update({name: str(value) for name, value in latest.items()})
        self.training_bar.log(format_logs(logs, self.max_str_len))
        self.training_bar.show()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the display of training."""
        close_bars([self])

    def _note(self, name: str, text: str) -> None:
        self.training_bar.shown.figures[name] = text
        self.training_bar.show()


def close_bars(callbacks: Iterable[Any]) -> None:
    """Close whatever bars are open: after an exception no event does.

    Args:
        callbacks: any; those with a `prediction_bar` or `training_bar` have them closed, also transformers' own.
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
    except TypeError:  # an iterable data set
        return None


def _examples_per_step(args: Any, state: Any) -> int | None:
    """Rows in an update, over all processes."""
    if args is None or not state.train_batch_size:
        return None
    return total_train_batch_size(args, state.train_batch_size)
