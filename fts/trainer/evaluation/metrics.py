"""The metrics of an evaluation: checked, named, and converted to Python numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fts.errors import ArgumentError

SPEED_METRICS = ("runtime", "samples_per_second", "steps_per_second")
BUILTIN_METRICS = ("loss", *SPEED_METRICS)
"""The metrics that every evaluation on labelled data has."""


def parse_metrics(metrics: Any, prefix: str, taken: Collection[str] = BUILTIN_METRICS) -> dict[str, int | float]:
    """What `compute_metrics` returned, by names without the prefix, and as Python numbers.

    Args:
        metrics: a dictionary of numbers; arrays and tensors of one element count as such.
        prefix: is removed from names that have it.
        taken: names of other metrics.

    Raises:
        ArgumentError: it is not a dictionary of numbers, or a name is that of another metric.

    >>> parse_metrics({"eval_f1": np.float32(0.5)}, "eval")
    {'f1': 0.5}
    """
    if not isinstance(metrics, Mapping):
        raise ArgumentError(
            f'compute_metrics returned {type(metrics).__name__}; it must return numbers by name, such as {{"accuracy": 0.5}}.'
        )
    parsed: dict[str, int | float] = {}
    for key, value in metrics.items():
        if not isinstance(key, str):
            raise ArgumentError(f"compute_metrics returned a metric named {key!r}; use a string, such as {str(key)!r}.")
        name, number = key.removeprefix(f"{prefix}_"), _to_number(value)
        if name in taken or name in parsed:
            raise ArgumentError(f"compute_metrics returned {key!r}, but there is another {prefix}_{name} already. Rename it.")
        if not isinstance(number, (int, float)):
            raise ArgumentError(
                f"compute_metrics returned {type(value).__name__} for {key!r}; it must be a number. Reduce it, as with .mean(), "
                "or return its parts under names of their own."
            )
        parsed[name] = number
    return parsed


def _to_number(value: Any) -> Any:
    """The Python number of a numpy or torch scalar; everything else unchanged."""
    one = (isinstance(value, Tensor) and value.numel() == 1) or (isinstance(value, (np.generic, np.ndarray)) and value.size == 1)
    return value.item() if one else value


def check_batch_metrics(compute_metrics: Callable[..., Any] | None) -> None:
    """Raise ArgumentError where `batch_eval_metrics=True` could not call compute_metrics.

    >>> check_batch_metrics(lambda prediction, compute_result: {})
    """
    if compute_metrics is None:
        return
    parameters = inspect.signature(compute_metrics).parameters.values()
    if not any(p.name == "compute_result" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise ArgumentError(
            "With batch_eval_metrics=True compute_metrics is called for each batch and must take a `compute_result` argument: it "
            "is True for the last batch, where the metrics of all batches are to be returned."
        )
