"""The best model: which evaluation is the best so far, and which checkpoint has its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments import IntervalStrategy, SaveStrategy, TrainingArguments, best_metric_name, is_better
from fts.trainer.callbacks import TrainerState
from fts.trainer.evaluation.metrics import BUILTIN_METRICS

logger = logging.getLogger(__name__)


def check_metric_for_best_model(args: TrainingArguments, eval_dataset: Any, *, computes: bool) -> None:
    """Raise ArgumentError before training where no evaluation can have `metric_for_best_model`.

    Args:
        args: `metric_for_best_model`.
        eval_dataset: the evaluation set, or a dictionary of several, whose metrics have their names.
        computes: whether there is a compute_metrics, whose metrics are not known before it is called.

    >>> check_metric_for_best_model(TrainingArguments(metric_for_best_model="f1", eval_strategy="epoch"), None, computes=True)
    """
    if args.metric_for_best_model is None or args.eval_strategy == IntervalStrategy.NO:
        return
    name = best_metric_name(args)
    prefixes = [f"eval_{key}_" for key in eval_dataset] if isinstance(eval_dataset, dict) else ["eval_"]
    known = [prefix + metric for prefix in prefixes for metric in BUILTIN_METRICS]
    if name not in known and not (computes and name.startswith(tuple(prefixes))):
        raise _unknown_metric(args, known)


def metric_for_best_model(args: TrainingArguments, metrics: dict[str, float]) -> float:
    """The metric of an evaluation that `metric_for_best_model` names.

    Raises:
        ArgumentError: the evaluation has no such metric.

    >>> metric_for_best_model(TrainingArguments(metric_for_best_model="loss"), {"eval_loss": 0.5})
    0.5
    """
    name = best_metric_name(args)
    if name not in metrics:
        raise _unknown_metric(args, metrics)
    return metrics[name]


def update_best_metric(args: TrainingArguments, trainer_state: TrainerState, metrics: dict[str, float]) -> bool:
    """Record an evaluation in the trainer state if it is the best so far; NaN never is.

    Args:
        args: `metric_for_best_model`.
        trainer_state: is updated if the evaluation is the best.
        metrics: those of the evaluation.

    Returns:
        Whether it is.

    Raises:
        ArgumentError: the evaluation has no such metric.

    >>> args, trainer_state = TrainingArguments(metric_for_best_model="loss"), TrainerState(global_step=5)
    >>> update_best_metric(args, trainer_state, {"eval_loss": 0.5}), trainer_state.best_metric, trainer_state.best_global_step
    (True, 0.5, 5)
    """
    if args.metric_for_best_model is None:
        return False
    value = metric_for_best_model(args, metrics)
    is_best = is_better(args, value, trainer_state.best_metric)
    if is_best:
        trainer_state.best_metric = value
        if args.save_strategy != SaveStrategy.NO:
            trainer_state.best_global_step = trainer_state.global_step
    return is_best


def best_checkpoint(args: TrainingArguments, trainer_state: TrainerState) -> str | None:
    """The checkpoint whose weights are loaded at the end of a run, with a warning where it is not that of the best evaluation.

    Args:
        args: `load_best_model_at_end`, and which metric decides.
        trainer_state: the state at the end of training.

    Returns:
        Its path; None where the last weights stay.

    >>> best_checkpoint(TrainingArguments(), TrainerState(best_model_checkpoint="run/checkpoint-5"))
    """
    if not args.load_best_model_at_end:
        return None
    step, path = trainer_state.best_global_step, trainer_state.best_model_checkpoint
    if args.metric_for_best_model is not None and trainer_state.best_metric is None:
        if args.eval_strategy != IntervalStrategy.NO:
            logger.warning("No evaluation had a finite %s: the last weights stay.", best_metric_name(args))
    elif step is not None and (path is None or Path(path).name != f"checkpoint-{step}"):
        logger.warning(
            "The best evaluation (%s=%s) was at step %s, of which there is no checkpoint: %s. Set save_steps to eval_steps "
            "(save_steps=%s, eval_steps=%s now), or save_strategy='best'.",
            *(best_metric_name(args), trainer_state.best_metric, step),
            *("the last weights stay" if path is None else f"those of {path}, the best that was saved, are loaded",),
            *(args.save_steps, args.eval_steps),
        )
    return path


def _unknown_metric(args: TrainingArguments, names: Iterable[str]) -> ArgumentError:
    return ArgumentError(
        f"metric_for_best_model={args.metric_for_best_model!r} is not one of the metrics of the evaluation: {', '.join(names)}. "
        "Name one of them, or return it from compute_metrics."
    )
