"""Evaluation and prediction: the loop over batches, its outputs as arrays, its metrics, and the best model.

It may use `fts.trainer.optimization` and what is below it.
"""

from fts.trainer.evaluation.best_model import (
    best_checkpoint,
    check_metric_for_best_model,
    metric_for_best_model,
    update_best_metric,
)
from fts.trainer.evaluation.config import EvaluationConfig, dataset_length, evaluation_config
from fts.trainer.evaluation.loop import EvaluationInterrupted, run_evaluation, warn_missing_labels
from fts.trainer.evaluation.metrics import check_batch_metrics
from fts.trainer.evaluation.outputs import BestRun, EvalLoopOutput, EvalPrediction, PredictionOutput, TrainOutput
from fts.trainer.evaluation.prediction import PredictionConfig, predict_batch

__all__ = [
    "BestRun",
    "EvalLoopOutput",
    "EvalPrediction",
    "EvaluationConfig",
    "EvaluationInterrupted",
    "PredictionConfig",
    "PredictionOutput",
    "TrainOutput",
    "best_checkpoint",
    "check_batch_metrics",
    "check_metric_for_best_model",
    "dataset_length",
    "evaluation_config",
    "metric_for_best_model",
    "predict_batch",
    "run_evaluation",
    "update_best_metric",
    "warn_missing_labels",
]
