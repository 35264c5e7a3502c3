"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fts.errors import MissingDependencyError
from fts.trainer.callbacks.base import TrainerCallback
from fts.trainer.callbacks.printer import readable


class ProgressCallback(TrainerCallback):
    """A bar for training, with the time left and the latest loss and rate, and one for each evaluation or prediction.

    Args:
        max_str_len: the most characters of a text that is logged.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        self.max_str_len = max_str_len
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self.current_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Open the bar of training, where a resumed run begins."""
        close_bars([self])
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = _bar(total=state.max_steps, initial=state.global_step, desc="train")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Move it."""
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> Any:
        """Open or move the bar of an evaluation."""
        if self.prediction_bar is None and state.is_world_process_zero:
            self.prediction_bar = _bar(total=_length(eval_dataloader), leave=self.training_bar is None, desc="evaluate")
        if self.prediction_bar is not None:
            self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the bar of the evaluation."""
        _close(self, "prediction_bar")

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the bar of the prediction."""
        _close(self, "prediction_bar")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Show loss and rate beside the bar, and write the whole log above it."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            beside = {"loss": logs["loss"]} | ({"lr": logs["learning_rate"]} if "learning_rate" in logs else {})
            self.training_bar.set_postfix(readable(beside), refresh=False)
        _close(self, "prediction_bar")
        self.training_bar.write(str(readable(logs, self.max_str_len)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the bar of training."""
        close_bars([self])


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


def _bar(**options: Any) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            "A progress bar needs tqdm: pip install fts[trainer]. Or print the logs instead: disable_tqdm=True."
        ) from error
    return tqdm(dynamic_ncols=True, **options)
