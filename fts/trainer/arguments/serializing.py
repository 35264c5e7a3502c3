"""Arguments as plain values, JSON and text. Secrets are masked."""

from __future__ import annotations

import json
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fts.trainer.arguments.training import TrainingArguments


def to_dict(self: TrainingArguments) -> dict[str, Any]:
    """All arguments as plain values, which JSON can hold; tokens are masked."""
    return {
        item.name: f"<{item.name.upper()}>" if item.name.endswith("_token") else _plain(getattr(self, item.name))
        for item in fields(self)
        if item.init
    }


def to_json_string(self: TrainingArguments) -> str:
    """All arguments as JSON; tokens are masked."""
    return json.dumps(to_dict(self), indent=2, default=str)


def to_sanitized_dict(self: TrainingArguments) -> dict[str, Any]:
    """All arguments and the batch sizes as numbers, booleans and texts, which a tracker's table can hold; tokens are masked."""
    values = {**to_dict(self), "train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
    return {name: value if type(value) in (bool, int, float, str, torch.Tensor) else str(value) for name, value in values.items()}


def to_text(self: TrainingArguments) -> str:
    """One argument a line, in the order of their names; tokens are masked."""
    lines = "".join(f"{name}={value},\n" for name, value in sorted(to_dict(self).items()))
    return f"{type(self).__name__}(\n{lines})"


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        return _plain(value.to_dict())  # AcceleratorConfig, GenerationConfig, a quantization config
    return value
