"""Figures of a run: as people read them, as files, and what is counted for them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fts.errors import ArgumentError, CheckpointError
from fts.trainer.callbacks.state import json_default

logger = logging.getLogger(__name__)

ALL_SPLITS = "all"
"""The split under whose name the figures of all splits are gathered."""


def metrics_format(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as people read them: sizes in MB, times as h:mm:ss.cc, operations in units of 2**30, numbers to four places.

    Args:
        metrics: figures by name: bytes where the name has `_mem_`, seconds where it has `_runtime`.

    >>> metrics_format({"train_runtime": 3671.5, "train_loss": 0.123456, "init_mem_cpu_alloc_delta": 3 << 20})
    {'train_runtime': '1:01:11.50', 'train_loss': 0.1235, 'init_mem_cpu_alloc_delta': '3MB'}
    """
    return {name: _formatted(name, value) for name, value in metrics.items()}


def _formatted(name: str, value: Any) -> Any:
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
    """Print the figures of a split as a table, by name.

    Args:
        split: "train", "eval", "test" or another name.
        metrics: figures by name.

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
    """Write the figures of a split to `<split>_results.json`.

    Args:
        output_dir: is made if it is not there.
        split: "train", "eval", "test" or another name.
        metrics: figures by name; numbers of numpy and torch are written, too.
        combined: whether to add them to `all_results.json`, which has the latest figure of each name.

    Raises:
        CheckpointError: `all_results.json` is there and damaged.
    """
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{ALL_SPLITS}_results.json"
    together = _read(path) | dict(metrics) if combined else {}
    _write(directory / f"{split}_results.json", metrics)
    if combined:
        _write(path, together)


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
    """Seconds since `start`, and how much was done a second.

    Args:
        prefix: is put before the figures' names.
        start: `time.perf_counter()` when the work began.
        num_samples: rows.
        num_steps: updates or batches.
        num_tokens: tokens.

    >>> list(speed_metrics("eval", time.perf_counter(), 10, num_tokens=100))
    ['eval_runtime', 'eval_samples_per_second', 'eval_tokens_per_second']
    """
    seconds = max(time.perf_counter() - start, 1e-9)
    counts = {"samples": num_samples, "steps": num_steps, "tokens": num_tokens}
    rates = {f"{prefix}_{name}_per_second": round(count / seconds, 3) for name, count in counts.items() if count is not None}
    return {f"{prefix}_runtime": round(seconds, 4)} | rates


def floating_point_ops(model: Any, inputs: Mapping[str, Any]) -> int:
    """Floating point operations of a forward and backward pass.

    Args:
        model: its own `floating_point_ops(inputs)` is asked if it has one; else its `num_parameters` and `main_input_name` (by
            default "input_ids") give 6 operations for each token and parameter outside the embeddings.
        inputs: the batch.

    Returns:
        The number; 0 where the model tells neither.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1: 2N forward, 4N backward.

    >>> floating_point_ops(object(), {})
    0
    """
    if callable(own := getattr(model, "floating_point_ops", None)):
        return int(own(inputs))
    main = inputs.get(getattr(model, "main_input_name", "input_ids"))
    if isinstance(main, Tensor) and callable(count := getattr(model, "num_parameters", None)):
        return 6 * main.numel() * int(count(exclude_embeddings=True))
    return 0


def count_input_tokens(
    batch: Mapping[str, Any], mode: str, main_input_name: str = "input_ids", pad_token_id: int | None = None
) -> int | Tensor:
    """How many tokens of a batch count as seen.

    Args:
        batch: tensors by name.
        mode: "no" counts none, "all" every element of the main input, "non_padding" those that `attention_mask` keeps or, where
            there is none, those that differ from `pad_token_id`; without either it counts all, with a warning.
        main_input_name: the batch's key of the tokens; where it is missing nothing is counted, with a warning.
        pad_token_id: the token that only fills up.

    Returns:
        The number; a 0-d int64 tensor on the batch's device where it has to be computed, so that nothing waits.

    Raises:
        ArgumentError: the mode is unknown.

    >>> import torch
    >>> batch = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> count_input_tokens(batch, "all"), count_input_tokens(batch, "non_padding")
    (3, tensor(2))
    """
    if mode not in ("no", "all", "non_padding"):
        raise ArgumentError(f"include_num_input_tokens_seen={mode!r} is unknown. Use 'no', 'all' or 'non_padding'.")
    if mode == "no":
        return 0
    main = batch.get(main_input_name)
    if not isinstance(main, Tensor):
        _warn_once(
            f"Tokens are not counted: the batch has no tensor {main_input_name!r} (it has {', '.join(map(str, batch))}). Give "
            "the model a main_input_name that names the tokens, or use include_num_input_tokens_seen='no'."
        )
        return 0
    if mode == "all":
        return main.numel()
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        return mask.sum()
    if pad_token_id is not None:
        return (main != pad_token_id).sum()
    _warn_once(
        "All tokens are counted as seen: padding shows neither by an attention_mask nor by a pad token of the processing class."
    )
    return main.numel()


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)
