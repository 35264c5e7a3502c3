"""Trackers: the callbacks that log the metrics and the configuration of a run to W&B, TensorBoard, MLflow and others.

Uses `callbacks` and `arguments` of the trainer.
"""

from fts.trainer.trackers.callback import TrackerCallback, close_trackers, set_plan
from fts.trainer.trackers.flyte import FlyteCallback
from fts.trainer.trackers.report_to import tracker_callbacks

__all__ = ["FlyteCallback", "TrackerCallback", "close_trackers", "set_plan", "tracker_callbacks"]
