"""Printing logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fts.trainer.callbacks.base import TrainerCallback


class PrinterCallback(TrainerCallback):
    """Prints logs, one line each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """Print the logs."""
        if logs and state.is_local_process_zero:
            print(format_logs(logs))  # noqa: T201


def format_logs(logs: Mapping[str, Any], max_str_len: int | None = None) -> dict[str, Any]:
    """Logs with numbers of four digits, for display.

    Args:
        logs: metrics by name.
        max_str_len: the maximum length of a string; a longer one ends in "…" and its length.

    >>> format_logs({"loss": 0.123456, "total_flos": 0.0, "text": "abcdef"}, max_str_len=3)
    {'loss': '0.1235', 'text': 'abc… (6 characters)'}
    """
    return {name: _format_value(value, max_str_len) for name, value in logs.items() if name != "total_flos"}


def _format_value(value: Any, max_str_len: int | None) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and max_str_len is not None and len(value) > max_str_len:
        return f"{value[:max_str_len]}… ({len(value)} characters)"
    return value
