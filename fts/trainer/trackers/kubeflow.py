"""Progress of a run inside a TrainJob of Kubeflow Trainer, which gives it an address, a certificate and a token."""

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

from fts.trainer.arguments.trackers import KUBEFLOW
from fts.trainer.trackers.names import as_they_are
from fts.trainer.trackers.tracker import Opening, Tracking

CERTIFICATE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"

INTERVAL = 5.0
"""Seconds between two reports."""

TIMEOUT = 5.0
"""Seconds that a report may take."""


@attrs.define
class Kubeflow:
    """Reports how far a run is, the time left, and its latest figures.

    Attributes:
        url: where reports are sent.
        total: updates of the run.
        first: the update that it began at.
        figures: the latest of each name.
        start: `time.monotonic()` when it began.
        sent: when the last report was sent.
    """

    url: str
    total: int
    first: int
    figures: dict[str, float] = attrs.field(factory=dict)
    start: float = attrs.field(factory=time.monotonic)
    sent: float = -INTERVAL
    step: int = 0

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """The job has its own facts."""

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Report, unless that was done just now."""
        self.figures |= values
        self.step = self.step if step is None else step
        if time.monotonic() - self.sent >= INTERVAL:
            self.send()

    def send(self) -> None:
        """Report now."""
        self.sent = time.monotonic()
        # the token is a file that the cluster replaces now and then
        head = {"Content-Type": "application/json", "Authorization": f"Bearer {Path(os.environ[TOKEN]).read_text().strip()}"}
        request = urllib.request.Request(self.url, json.dumps(self.report()).encode(), head, method="POST")
        context = ssl.create_default_context(cafile=os.environ[CERTIFICATE])
        with urllib.request.urlopen(request, timeout=TIMEOUT, context=context):
            pass

    def report(self) -> dict[str, Any]:
        """What is sent: the `trainerStatus` of Kubeflow's API."""
        done = self.step - self.first
        left = (self.total - self.step) * (time.monotonic() - self.start) / done if done > 0 else None
        status: dict[str, Any] = {"lastUpdatedTime": datetime.now(UTC).isoformat()}
        status["progressPercentage"] = max(0, min(100, 100 * self.step // max(self.total, 1)))
        if left is not None:
            status["estimatedRemainingSeconds"] = int(left)
        return {"trainerStatus": status | {"metrics": [{"name": k, "value": str(v)} for k, v in self.figures.items()]}}


def kubeflow(opening: Opening) -> Tracking:
    """Opened by the job; the last report says that all is done."""
    total = int(opening.facts.get("plan/total_steps", opening.step))
    tracker = Kubeflow(os.environ[KUBEFLOW], total, opening.step, step=opening.step)
    tracker.send()
    return Tracking(tracker, rename=as_they_are, finish=tracker.send)
