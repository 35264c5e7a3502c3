"""The logs that trackers get: the names of metrics, and their values as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

SPLITS = ("eval", "test")


def rewrite_logs(logs: Mapping[str, float]) -> dict[str, float]:
    """Group names by split: `eval/loss` for `eval_loss`, `test/loss` for `test_loss`, and `train/loss` for `loss`.

    >>> rewrite_logs({"loss": 1.0, "eval_loss": 2.0, "train_runtime": 3.0})
    {'train/loss': 1.0, 'eval/loss': 2.0, 'train/train_runtime': 3.0}
    """
    return {_grouped_name(name): value for name, value in logs.items()}


def _grouped_name(name: str) -> str:
    split, _, rest = name.partition("_")
    return f"{split}/{rest}" if split in SPLITS and rest else f"train/{name}"


def keep_names(logs: Mapping[str, float]) -> dict[str, float]:
    """Keep the names of the logs."""
    return dict(logs)


def numeric_logs(logs: Mapping[str, Any]) -> dict[str, float]:
    """The entries of the logs that are numbers, as Python numbers.

    >>> numeric_logs({"loss": np.float32(0.5), "count": 3, "text": "abc"})
    {'loss': 0.5, 'count': 3}
    """
    values = {name: _number(value) for name, value in logs.items()}
    return {name: value for name, value in values.items() if value is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.item() if value.size == 1 else None
    return value if isinstance(value, (int, float)) else None
