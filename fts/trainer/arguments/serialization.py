"""Arguments as plain values, JSON and text. Secrets are masked."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fts.trainer.arguments.training_arguments import TrainingArguments


SECRET = re.compile(r"(^|access_|api_|auth_|hub_)token$|api_key$|password$|secret$", re.IGNORECASE)
"""Names whose values nobody shall see, also within an argument; an argument's own name may end in `_token`, too."""


def to_dict(self: TrainingArguments) -> dict[str, Any]:
    """All arguments as plain values, which JSON can hold; tokens, keys and passwords are masked.

    >>> from fts.trainer import TrainingArguments
    >>> args = TrainingArguments(hub_token="hf_x", gradient_checkpointing_kwargs={"api_key": "x"})
    >>> args.to_dict()["hub_token"], args.to_dict()["gradient_checkpointing_kwargs"]
    ('<HUB_TOKEN>', {'api_key': '<API_KEY>'})
    """
    return {
        item.name: _masked(item.name) if item.name.endswith("_token") else _plain_of(item.name, getattr(self, item.name))
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


def _plain_of(name: Any, value: Any) -> Any:
    """A value by its name: strings that are secret are masked."""
    secret = isinstance(name, str) and isinstance(value, str) and SECRET.search(name) is not None
    return _masked(name) if secret else _plain(value)


def _masked(name: str) -> str:
    return f"<{name.upper()}>"


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {key: _plain_of(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        return _plain(value.to_dict())  # AcceleratorConfig, GenerationConfig, a quantization config
    return value
