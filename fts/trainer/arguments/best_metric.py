"""`metric_for_best_model` and `greater_is_better`: which metric decides, and which of two values is better."""

from __future__ import annotations

import math
from typing import Protocol


class BestMetricArguments(Protocol):
    """The arguments that say what is best."""

    metric_for_best_model: str | None
    greater_is_better: bool | None


def best_metric_name(args: BestMetricArguments) -> str:
    """`metric_for_best_model` as it stands in the metrics of an evaluation.

    >>> from fts.trainer import TrainingArguments
    >>> best_metric_name(TrainingArguments(metric_for_best_model="loss"))
    'eval_loss'
    """
    name = str(args.metric_for_best_model)
    return name if name.startswith("eval_") else f"eval_{name}"


def is_better(args: BestMetricArguments, value: float, best: float | None, threshold: float = 0.0) -> bool:
    """Whether a metric is better than the best so far.

    Args:
        args: `greater_is_better`.
        value: the metric. NaN is never better, and anything else is better than NaN.
        best: the best so far; None where there is none.
        threshold: by how much it must be better.

    >>> from fts.trainer import TrainingArguments
    >>> args = TrainingArguments(metric_for_best_model="loss")
    >>> is_better(args, 0.4, 0.5), is_better(args, math.nan, None), is_better(args, 0.5, math.nan)
    (True, False, True)
    """
    if math.isnan(value) or best is None or math.isnan(best):
        return not math.isnan(value)
    return (value - best if args.greater_is_better else best - value) > threshold
