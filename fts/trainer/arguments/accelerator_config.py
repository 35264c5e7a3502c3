"""The settings of accelerate's Accelerator."""

# ruff: noqa: RUF009 - arg() makes a dataclass field

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments.checks import check_bool, check_int, check_known_names
from fts.trainer.arguments.fields import arg
from fts.trainer.arguments.parsing import parse_json_dict


class NotAnInstanceError(ArgumentError, NotImplementedError):
    """A class was given where an instance is expected."""


@dataclass
class AcceleratorConfig:
    """How batches are divided between processes, and how gradients are accumulated, with Hugging Face's names and defaults.

    Raises:
        ArgumentError: a value cannot work.

    >>> AcceleratorConfig(split_batches=True).to_dict()["split_batches"]
    True
    """

    split_batches: bool = arg(False, "Whether the batch size is the global one, so that each process gets a part.")
    dispatch_batches: bool | None = arg(None, "Whether one process reads the data for all; None: if the data is iterable only.")
    even_batches: bool = arg(
        True, "Whether to repeat examples so that all processes get equally many; in fts they have no weight."
    )
    use_seedable_sampler: bool = arg(True, "Whether the order of the data is a function of the seed; it always is in fts.")
    non_blocking: bool = arg(False, "For loaders that accelerate makes; fts always copies batches to the device asynchronously.")
    gradient_accumulation_kwargs: dict[str, Any] | None = arg(
        None, "sync_each_batch: all-reduce gradients after each micro-batch; others for accelerate."
    )
    use_configured_state: bool = arg(False, "Whether to use the process state that accelerate already has.")

    def __new__(cls, *args: Any, **kwargs: Any) -> AcceleratorConfig:
        check_known_names(cls.__name__, kwargs, [item.name for item in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for item in fields(AcceleratorConfig):
            if isinstance(item.default, bool):
                check_bool(f"accelerator_config: {item.name}", getattr(self, item.name))
        check_bool("accelerator_config: dispatch_batches", self.dispatch_batches, or_none=True)
        given = self.gradient_accumulation_kwargs
        if given is not None and not isinstance(given, dict):
            raise ArgumentError(f"accelerator_config: gradient_accumulation_kwargs={given!r} must be a dict.")
        if given and given.get("num_steps") is not None:
            check_int("accelerator_config: num_steps", given["num_steps"], 1)

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> AcceleratorConfig:
        """Read it from a JSON file."""
        try:
            values = json.loads(Path(json_file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(
                f"accelerator_config={str(json_file)!r} is no readable JSON file ({error}). Give the path of one, or a dict."
            ) from error
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return copy.deepcopy(asdict(self))

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove a value, as from a dictionary; the attribute then has the class's default."""
        return self.__dict__.pop(key, default)


def parse_accelerator_config(name: str, value: Any) -> AcceleratorConfig:
    """A configuration from None, a dict, JSON, the path of a JSON file, or an instance.

    >>> parse_accelerator_config("accelerator_config", '{"even_batches": false}').even_batches
    False
    """
    if isinstance(value, type):
        raise NotAnInstanceError(
            f"Tried passing in a callable to `accelerator_config`: the class {value.__name__}. "
            f"Give an instance: {value.__name__}()."
        )
    if isinstance(value, AcceleratorConfig):
        return value
    if value is None:
        return AcceleratorConfig()
    if isinstance(value, Path) or (isinstance(value, str) and not value.lstrip().startswith("{")):
        return AcceleratorConfig.from_json_file(value)
    if isinstance(value, str):
        return AcceleratorConfig(**parse_json_dict(name, value))
    if isinstance(value, dict):
        return AcceleratorConfig(**value)
    if hasattr(value, "to_dict") and hasattr(value, "split_batches"):  # transformers' own
        return AcceleratorConfig(**value.to_dict())
    raise ArgumentError(f"{name}={value!r} must be a dict, the path of a JSON file, or an AcceleratorConfig.")


def check_num_steps(given: Mapping[str, Any] | None, steps: int) -> None:
    """Raise ArgumentError if accelerate's configuration has another number of micro-batches in an update.

    Args:
        given: its `gradient_accumulation_kwargs`; `num_steps` may be 1, or the same number.
        steps: `gradient_accumulation_steps`.

    >>> check_num_steps({"num_steps": 4}, 4)
    """
    num_steps = (given or {}).get("num_steps", 1)
    if num_steps not in (1, steps):
        raise ArgumentError(
            f"The `AcceleratorConfig`'s `num_steps` is set but to {num_steps}, where gradient_accumulation_steps={steps}. Leave "
            f"num_steps out and use gradient_accumulation_steps={num_steps}."
        )
