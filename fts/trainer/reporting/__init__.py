"""Metrics files and tables, running metrics between logs, memory, the cost of batches, and the log level.

It may use `arguments`.
"""

from fts.trainer.reporting.batch_cost import count_input_tokens, floating_point_ops
from fts.trainer.reporting.log_level import apply_log_level
from fts.trainer.reporting.memory import TrainerMemoryTracker
from fts.trainer.reporting.metrics import json_default, log_metrics, metrics_format, save_metrics, speed_metrics
from fts.trainer.reporting.running_metrics import RunningMetrics

__all__ = [
    "RunningMetrics",
    "TrainerMemoryTracker",
    "apply_log_level",
    "count_input_tokens",
    "floating_point_ops",
    "json_default",
    "log_metrics",
    "metrics_format",
    "save_metrics",
    "speed_metrics",
]
