"""Progress of a run inside a TrainJob of Kubeflow Trainer, which provides a URL, a certificate and a token."""

from __future__ import annotations

import json
import os
import ssl
import time
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from fts.trainer.arguments import KUBEFLOW_VARIABLE
from fts.trainer.trackers.logs import keep_names
from fts.trainer.trackers.tracker import RunInfo, TrackerRun

CERTIFICATE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"

INTERVAL = 5.0
"""Seconds between two reports."""

TIMEOUT = 5.0
"""Seconds that a report may take."""


@attrs.define
class Kubeflow:
    """Reports the progress of a run, the remaining time, and its latest metrics.

    Attributes:
        url: where reports are sent.
        total: updates of the run.
        first: the update that it started at.
        metrics: the latest of each name.
        start: `time.monotonic()` when it started.
        sent: when the last report was sent.
    """

    url: str
    total: int
    first: int
    metrics: dict[str, float] = attrs.field(factory=dict)
    start: float = attrs.field(factory=time.monotonic)
    sent: float = -INTERVAL
    step: int = 0

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Does nothing: the job has its own configuration."""

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Send a report, unless the last one is more recent than `INTERVAL`."""
        self.metrics |= values
        self.step = self.step if step is None else step
        if time.monotonic() - self.sent >= INTERVAL:
            self.send()

    def send(self) -> None:
        """Send a report now."""
        self.sent = time.monotonic()
        # the token is a file that the cluster replaces from time to time
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {Path(os.environ[TOKEN]).read_text().strip()}"}
        request = urllib.request.Request(self.url, json.dumps(self.report()).encode(), headers, method="POST")
        context = ssl.create_default_context(cafile=os.environ[CERTIFICATE])
        with urllib.request.urlopen(request, timeout=TIMEOUT, context=context):
            pass

    def report(self) -> dict[str, Any]:
        """The report: the `trainerStatus` of Kubeflow's API."""
        done = self.step - self.first
        seconds_left = (self.total - self.step) * (time.monotonic() - self.start) / done if done > 0 else None
        status: dict[str, Any] = {"lastUpdatedTime": datetime.now(UTC).isoformat()}
        status["progressPercentage"] = max(0, min(100, 100 * self.step // max(self.total, 1)))
        if seconds_left is not None:
            status["estimatedRemainingSeconds"] = int(seconds_left)
        return {"trainerStatus": status | {"metrics": [{"name": k, "value": str(v)} for k, v in self.metrics.items()]}}


def kubeflow(info: RunInfo) -> TrackerRun:
    """Opened by the job; the last report says that the run is done."""
    total = int(info.config.get("plan/total_steps", info.step))
    tracker = Kubeflow(os.environ[KUBEFLOW_VARIABLE], total, info.step, step=info.step)
    tracker.send()
    return TrackerRun(tracker, rewrite=keep_names, finish=tracker.send)
