"""The names that trackers show, and the numbers under them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

SPLITS = ("eval", "test")


def by_split(logs: Mapping[str, float]) -> dict[str, float]:
    """Names in groups: `eval/loss` for `eval_loss`, `test/loss` for `test_loss`, and `train/loss` for `loss`.

    >>> by_split({"loss": 1.0, "eval_loss": 2.0, "train_runtime": 3.0})
    {'train/loss': 1.0, 'eval/loss': 2.0, 'train/train_runtime': 3.0}
    """
    return {_grouped(name): value for name, value in logs.items()}


def _grouped(name: str) -> str:
    split, _, rest = name.partition("_")
    return f"{split}/{rest}" if split in SPLITS and rest else f"train/{name}"


def as_they_are(logs: Mapping[str, float]) -> dict[str, float]:
    """The same names."""
    return dict(logs)


def numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """Those of the logs that are numbers, as Python's.

    >>> numbers({"loss": np.float32(0.5), "count": 3, "text": "abc"})
    {'loss': 0.5, 'count': 3}
    """
    found = {name: _number(value) for name, value in logs.items()}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.item() if value.size == 1 else None
    return value if isinstance(value, (int, float)) else None
