"""Early stopping: training ends when evaluations stop improving."""

from __future__ import annotations

import logging
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments import IntervalStrategy, best_metric_name, is_better
from fts.trainer.callbacks.base import TrainerCallback
from fts.trainer.callbacks.state import ExportableState

logger = logging.getLogger(__name__)


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Ends training when evaluations stop improving by `metric_for_best_model`.

    Args:
        early_stopping_patience: how many evaluations in a row may fail to improve on the best one.
        early_stopping_threshold: the minimum improvement that counts.

    Raises:
        ArgumentError: the run has no `metric_for_best_model`, or no evaluations.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Check the arguments; a resumed run that it had stopped stays stopped, unless the patience was raised."""
        if args.metric_for_best_model is None:
            raise ArgumentError("EarlyStoppingCallback needs metric_for_best_model in the arguments, such as 'loss'.")
        if args.eval_strategy == IntervalStrategy.NO:
            raise ArgumentError("EarlyStoppingCallback needs evaluations: use eval_strategy='steps' or 'epoch'.")
        if not args.load_best_model_at_end:
            logger.warning("EarlyStoppingCallback without load_best_model_at_end=True: training ends with the last weights.")
        self._stop(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> Any:
        """Count evaluations without improvement."""
        value = (metrics or {}).get(best_metric_name(args))
        if value is None:
            logger.warning("Early stopping found no %s in %s.", best_metric_name(args), sorted(metrics or {}))
            return
        self.check_metric_value(args, state, control, value)
        self._stop(control)

    def check_metric_value(self, args: Any, state: Any, control: Any, metric_value: float) -> None:
        """Reset the counter if a metric is better than `state.best_metric`, else increase it; NaN is never better."""
        improved = is_better(args, metric_value, state.best_metric, self.early_stopping_threshold or 0.0)
        self.early_stopping_patience_counter = 0 if improved else self.early_stopping_patience_counter + 1

    def _stop(self, control: Any) -> None:
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """The state that checkpoints save."""
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }
