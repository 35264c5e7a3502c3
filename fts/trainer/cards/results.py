"""The metrics in a model card: the final results, and a table of all evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "eval_"
NON_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
MAX_TABLE_ROWS = 100
"""The most rows that the table has."""

History = Sequence[Mapping[str, Any]]


def final_results(history: History, best_step: int | None = None) -> dict[str, Any]:
    """The metrics of the model as it is now, by name.

    Args:
        history: `log_history`.
        best_step: the update of the best evaluation, if its weights were loaded after training.

    Returns:
        Those of the evaluation after training, else of the best or the last one; empty if there was none.

    >>> final_results([{"eval_loss": 0.5, "eval_f1": 0.9, "step": 1}, {"eval_loss": 0.7, "step": 2}], best_step=1)
    {'loss': 0.5, 'f1': 0.9}
    """
    end = max((number for number, entry in enumerate(history) if "train_runtime" in entry), default=-1)
    later = [entry for entry in history[end + 1 :] if _metrics(entry)]
    entries = later if end >= 0 and later else [entry for entry in history if _metrics(entry)]
    if not entries:
        return {}
    steps = [entry.get("step") for entry in entries]
    step = best_step if best_step in steps and not (end >= 0 and later) else steps[-1]
    return {name: value for entry in entries if entry.get("step") == step for name, value in _metrics(entry).items()}


def evaluation_table(history: History) -> list[dict[str, Any]]:
    """A row for each evaluated update: losses, epoch, step and every metric.

    Args:
        history: `log_history` of the run; evaluations after training are not in the table.

    >>> evaluation_table([{"loss": 1.0, "step": 5}, {"eval_loss": 0.5, "eval_f1": 0.9, "epoch": 1.0, "step": 6}])
    [{'Training Loss': 1.0, 'Epoch': 1.0, 'Step': 6, 'Validation Loss': 0.5, 'F1': 0.9}]
    """
    rows: dict[Any, dict[str, Any]] = {}
    loss: Any = "No log"
    for entry in history:
        if "train_runtime" in entry:
            break
        loss = entry.get("loss", loss)
        metrics = _metrics(entry)
        if metrics:
            row = rows.setdefault(
                entry.get("step"), {"Training Loss": loss, "Epoch": entry.get("epoch"), "Step": entry.get("step")}
            )
            row.update({"Validation Loss" if name == "loss" else pretty_name(name): value for name, value in metrics.items()})
    stride = -(-len(rows) // MAX_TABLE_ROWS)
    return list(rows.values())[::-1][:: stride or 1][::-1]


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; a cell that a row does not have is empty.

    >>> print(markdown_table([{"Step": 1, "Loss": 0.123456}, {"Step": 20, "F1": 1.0}]))
    | Step | Loss   | F1  |
    |-----:|-------:|----:|
    | 1    | 0.1235 |     |
    | 20   |        | 1.0 |
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[format_value(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(names, *cells, strict=True)]
    lines = [[name.ljust(width) for name, width in zip(names, widths, strict=True)]]
    lines += [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    rendered = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rendered[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *rendered[1:]])


def pretty_name(name: str) -> str:
    """A metric's name as a title.

    >>> pretty_name("f1"), pretty_name("exact_match"), pretty_name("rougeLsum")
    ('F1', 'Exact Match', 'RougeLsum')
    """
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_") if part)


def format_value(value: Any) -> str:
    """A value as readable text.

    >>> format_value(0.123456), format_value(2.0), format_value(3e-05), format_value(7), format_value(None)
    ('0.1235', '2.0', '3e-05', '7', '')
    """
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value) and abs(value) >= 1e-3:
        return str(round(value, 4))
    return f"{value:.4g}" if isinstance(value, float) and value else str(value).replace("|", "\\|").replace("\n", " ")


def is_number(value: Any) -> bool:
    """Whether a value can be that of a metric in a card's metadata."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _metrics(entry: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name.removeprefix(PREFIX): value for name, value in entry.items() if name.startswith(PREFIX)}
    return {name: value for name, value in metrics.items() if not name.endswith(NON_METRICS)}
