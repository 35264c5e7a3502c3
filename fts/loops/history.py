"""What a run of the Trainer tells in its checkpoints: the evaluations, and which was the best."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fts.errors import CheckpointError
from fts.storage import read_document

TRAINER_STATE = "trainer_state.json"
"""Where it tells it, in Hugging Face's layout."""


def history_in(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint tells; empty if it tells nothing, or that cannot be read: no run hangs on it."""
    try:
        return read_document(checkpoint, TRAINER_STATE)
    except CheckpointError:
        return {}


def metrics_at(history: Mapping[str, Any], step: int) -> dict[str, float]:
    """The figures of the evaluation at a step, without those of its speed.

    >>> metrics_at({"log_history": [{"step": 5, "eval_loss": 0.5, "eval_runtime": 2.0}]}, 5)
    {'eval_loss': 0.5}
    """
    entries = history.get("log_history")
    figures = [
        pair
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and entry.get("step") == step
        for pair in entry.items()
    ]
    return {name: float(value) for name, value in figures if _is_metric(name, value)}


def _is_metric(name: str, value: Any) -> bool:
    number = isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
    return number and name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))


def best_step(history: Mapping[str, Any]) -> int | None:
    """The step of the best evaluation so far; None if it does not tell.

    >>> best_step({"best_model_checkpoint": "runs/a/checkpoint-10"})
    10
    """
    step, path = history.get("best_global_step"), history.get("best_model_checkpoint")
    if isinstance(path, str) and (name := re.fullmatch(r"checkpoint-([0-9]{1,18})", Path(path).name)):
        return int(name[1])
    return step if isinstance(step, int) and not isinstance(step, bool) and step > 0 else None
