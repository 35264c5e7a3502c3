"""Arguments as plain values, JSON and a string. Secrets are masked."""

from __future__ import annotations

import json
import re
from dataclasses import Field, fields
from enum import Enum
from typing import Any, ClassVar, Protocol

import torch


class DataclassArguments(Protocol):
    """A dataclass with the batch sizes that trackers record."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def train_batch_size(self) -> int:
        """Examples in a micro-batch of one process."""

    @property
    def eval_batch_size(self) -> int:
        """Examples in a batch of evaluation of one process."""


SECRET = re.compile(r"(^|access_|api_|auth_|hub_)token$|api_key$|password$|secret$", re.IGNORECASE)
"""Names of secrets, also inside an argument; of the arguments themselves all names that end in `_token` are secret."""


def to_dict(self: DataclassArguments) -> dict[str, Any]:
    """All arguments as JSON values; tokens, keys and passwords are masked.

    >>> from fts.trainer import TrainingArguments
    >>> args = TrainingArguments(hub_token="hf_x", gradient_checkpointing_kwargs={"api_key": "x"})
    >>> args.to_dict()["hub_token"], args.to_dict()["gradient_checkpointing_kwargs"]
    ('<HUB_TOKEN>', {'api_key': '<API_KEY>'})
    """
    return {
        item.name: _masked(item.name) if item.name.endswith("_token") else _plain_item(item.name, getattr(self, item.name))
        for item in fields(self)
        if item.init
    }


def to_json_string(self: DataclassArguments) -> str:
    """All arguments as JSON; tokens are masked."""
    return json.dumps(to_dict(self), indent=2, default=str)


def to_sanitized_dict(self: DataclassArguments) -> dict[str, Any]:
    """All arguments and the batch sizes as numbers, booleans and strings, which a tracker's table can hold; tokens are masked."""
    values = {**to_dict(self), "train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
    return {name: value if type(value) in (bool, int, float, str, torch.Tensor) else str(value) for name, value in values.items()}


def to_string(self: DataclassArguments) -> str:
    """One argument a line, in the order of their names; tokens are masked."""
    lines = "".join(f"{name}={value},\n" for name, value in sorted(to_dict(self).items()))
    return f"{type(self).__name__}(\n{lines})"


def _plain_item(name: Any, value: Any) -> Any:
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
        return {key: _plain_item(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        return _plain(value.to_dict())  # AcceleratorConfig, GenerationConfig, a quantization config
    return value
