"""The `trainer_state.json` of a checkpoint: evaluations, and which was the best."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fts.errors import CheckpointError
from fts.storage import read_json

TRAINER_STATE_NAME = "trainer_state.json"
"""The name of that file, in Hugging Face's layout."""


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint; empty if there is none, or it cannot be read: no run depends on it."""
    try:
        return read_json(checkpoint, TRAINER_STATE_NAME)
    except CheckpointError:
        return {}


def metrics_at(trainer_state: Mapping[str, Any], step: int) -> dict[str, float]:
    """The metrics of the evaluation at a step, without those of its speed.

    >>> metrics_at({"log_history": [{"step": 5, "eval_loss": 0.5, "eval_runtime": 2.0}]}, 5)
    {'eval_loss': 0.5}
    """
    entries = trainer_state.get("log_history")
    metrics = [
        pair
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and entry.get("step") == step
        for pair in entry.items()
    ]
    return {name: float(value) for name, value in metrics if _is_metric(name, value)}


def _is_metric(name: str, value: Any) -> bool:
    number = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
    return number and name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))


def best_step(trainer_state: Mapping[str, Any]) -> int | None:
    """The step of the best evaluation so far; None if it is not known.

    >>> best_step({"best_model_checkpoint": "runs/a/checkpoint-10"})
    10
    """
    step, path = trainer_state.get("best_global_step"), trainer_state.get("best_model_checkpoint")
    if isinstance(path, str) and (name := re.fullmatch(r"checkpoint-([0-9]{1,18})", Path(path).name)):
        return int(name[1])
    return step if isinstance(step, int) and not isinstance(step, bool) and step > 0 else None
