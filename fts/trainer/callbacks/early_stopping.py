"""The end of training when evaluations stop getting better."""

from __future__ import annotations

import logging
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments.enums import IntervalStrategy
from fts.trainer.callbacks.base import TrainerCallback
from fts.trainer.callbacks.state import ExportableState
from fts.trainer.arguments.best_metric import best_metric_name, is_better

logger = logging.getLogger(__name__)


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Ends training when evaluations stop getting better by `metric_for_best_model`.

    Args:
        early_stopping_patience: how many evaluations in a row may be no better than the best one.
        early_stopping_threshold: by how much a better one must be better.

    Raises:
        ArgumentError: the arguments of the run do not say what better means, or it has no evaluations.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Check that it can work; a resumed run that it had ended stays so, unless more patience was given to it."""
        if args.metric_for_best_model is None:
            raise ArgumentError("EarlyStoppingCallback needs metric_for_best_model in the arguments, such as 'loss'.")
        if args.eval_strategy == IntervalStrategy.NO:
            raise ArgumentError("EarlyStoppingCallback needs evaluations: use eval_strategy='steps' or 'epoch'.")
        if not args.load_best_model_at_end:
            logger.warning("EarlyStoppingCallback without load_best_model_at_end=True: training ends with the last weights.")
        self._stop(control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> Any:
        """Count evaluations without progress."""
        value = (metrics or {}).get(best_metric_name(args))
        if value is None:
            logger.warning("Early stopping found no %s among %s.", best_metric_name(args), sorted(metrics or {}))
            return
        self.check_metric_value(args, state, control, value)
        self._stop(control)

    def check_metric_value(self, args: Any, state: Any, control: Any, metric_value: float) -> None:
        """Count one evaluation: from 0 again if it is better than those before, whose best one the state has; NaN never is."""
        better = is_better(args, metric_value, state.best_metric, self.early_stopping_threshold or 0.0)
        self.early_stopping_patience_counter = 0 if better else self.early_stopping_patience_counter + 1

    def _stop(self, control: Any) -> None:
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """What checkpoints keep."""
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }
