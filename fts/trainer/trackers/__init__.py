"""Trackers: where the figures of a run are sent."""

from fts.trainer.trackers.callback import TrackerCallback, close_trackers, tell_plan
from fts.trainer.trackers.flyte import FlyteCallback
from fts.trainer.trackers.report_to import tracker_callbacks

__all__ = ["FlyteCallback", "TrackerCallback", "close_trackers", "tell_plan", "tracker_callbacks"]
