"""Metrics of a run: formatted, printed, written to JSON files, and per second."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from fts.errors import CheckpointError

ALL_SPLITS = "all"
"""The name of the file with the metrics of all splits."""


def metrics_format(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics in readable units: sizes in MB, times as h:mm:ss.cc, operations in units of 2**30, numbers to four places.

    Args:
        metrics: numbers by name: bytes where the name has `_mem_`, seconds where it has `_runtime`.

    >>> metrics_format({"train_runtime": 3671.5, "train_loss": 0.123456, "init_mem_cpu_alloc_delta": 3 << 20})
    {'train_runtime': '1:01:11.50', 'train_loss': 0.1235, 'init_mem_cpu_alloc_delta': '3MB'}
    """
    return {name: _format(name, value) for name, value in metrics.items()}


def _format(name: str, value: Any) -> Any:
    if not isinstance(value, (int, float)):
        return value
    if "_mem_" in name:
        return f"{int(value) >> 20}MB"
    if "_runtime" in name:
        return f"{timedelta(seconds=int(value))}.{int(abs(value - int(value)) * 100):02d}"
    if name == "total_flos":
        return f"{int(value) >> 30}GF"
    return round(value, 4) if isinstance(value, float) else value


def log_metrics(split: str, metrics: Mapping[str, Any]) -> None:
    """Print the metrics of a split as a table, by name.

    Args:
        split: "train", "eval", "test" or another name.
        metrics: values by name.

    >>> log_metrics("eval", {"eval_loss": 0.5, "epoch": 1.0})
    ***** eval metrics *****
      epoch     = 1.0
      eval_loss = 0.5
    """
    shown = {
        name: value if isinstance(value, (int, float, str)) else str(value) for name, value in metrics_format(metrics).items()
    }
    names, values = max(map(len, shown), default=0), max((len(str(value)) for value in shown.values()), default=0)
    lines = [f"  {name: <{names}} = {shown[name]:>{values}}" for name in sorted(shown)]
    print("\n".join([f"***** {split} metrics *****", *lines]))  # noqa: T201


def save_metrics(output_dir: str | Path, split: str, metrics: Mapping[str, Any], combined: bool = True) -> None:
    """Write the metrics of a split to `<split>_results.json`.

    Args:
        output_dir: created if it does not exist.
        split: "train", "eval", "test" or another name.
        metrics: values by name; numbers of numpy and torch are written, too.
        combined: whether to add them to `all_results.json`, which has the latest value of each name.

    Raises:
        CheckpointError: `all_results.json` exists and is corrupt.
    """
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{ALL_SPLITS}_results.json"
    merged = _read(path) | dict(metrics) if combined else {}
    _write(directory / f"{split}_results.json", metrics)
    if combined:
        _write(path, merged)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Delete it, or use combined=False.") from error


def _write(path: Path, metrics: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(metrics), indent=4, sort_keys=True, default=json_default), encoding="utf-8")


def speed_metrics(
    prefix: str, start: float, num_samples: float | None = None, num_steps: float | None = None, num_tokens: float | None = None
) -> dict[str, float]:
    """Seconds since `start`, and throughput.

    Args:
        prefix: of the metrics' names.
        start: `time.perf_counter()` when the work began.
        num_samples: examples.
        num_steps: updates or batches.
        num_tokens: tokens.

    >>> list(speed_metrics("eval", time.perf_counter(), 10, num_tokens=100))
    ['eval_runtime', 'eval_samples_per_second', 'eval_tokens_per_second']
    """
    seconds = max(time.perf_counter() - start, 1e-9)
    counts = {"samples": num_samples, "steps": num_steps, "tokens": num_tokens}
    rates = {f"{prefix}_{name}_per_second": round(count / seconds, 3) for name, count in counts.items() if count is not None}
    return {f"{prefix}_runtime": round(seconds, 4)} | rates


def json_default(value: Any) -> Any:
    """A number or array of numpy or torch as a JSON value; for `json.dumps(default=json_default)`.

    Raises:
        TypeError: it is something else.

    >>> import torch
    >>> json.dumps({"loss": torch.tensor(0.5)}, default=json_default)
    '{"loss": 0.5}'
    """
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    raise TypeError(f"{value!r} is a {type(value).__name__}, which JSON cannot hold")
