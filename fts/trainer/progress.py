"""Progress bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fts.errors import MissingDependencyError
from fts.trainer.callbacks import TrainerCallback, readable


class ProgressCallback(TrainerCallback):
    """A bar for training, with the latest loss and rate, and one for each evaluation or prediction."""

    def __init__(self) -> None:
        self.training_bar: Any = None
        self.prediction_bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Open the bar of training, where a resumed run begins."""
        if state.is_world_process_zero:
            self.training_bar = _bar(total=state.max_steps, initial=state.global_step, desc="train")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Move it."""
        if self.training_bar is not None:
            self.training_bar.update(1)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> Any:
        """Open or move the bar of an evaluation."""
        if self.prediction_bar is None and state.is_world_process_zero:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self.prediction_bar = _bar(total=total, leave=self.training_bar is None, desc="evaluate")
        if self.prediction_bar is not None:
            self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the bar of the evaluation."""
        self._close_prediction()

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the bar of the prediction."""
        self._close_prediction()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Show loss and rate beside the bar, and write the whole log above it."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            shown = readable({"loss": logs["loss"], "lr": logs.get("learning_rate", 0.0)})
            self.training_bar.set_postfix(shown, refresh=False)
        self._close_prediction()
        self.training_bar.write(str(readable(dict(logs))))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Close the bar of training."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def _close_prediction(self) -> None:
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None


def _bar(**options: Any) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            "A progress bar needs tqdm: pip install fts[trainer]. Or print the logs instead: disable_tqdm=True."
        ) from error
    return tqdm(dynamic_ncols=True, **options)
