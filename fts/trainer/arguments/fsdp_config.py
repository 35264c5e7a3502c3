"""What `fsdp_config` may say: a table of names, each with what reads its value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from fts.errors import ArgumentError
from fts.trainer.arguments.checks import check_names, check_one_of, check_text, check_whole
from fts.trainer.arguments.choices import FSDPOption
from fts.trainer.arguments.parsing import dict_from_text

WRAPS = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
STATES = {"FULL_STATE_DICT": "full", "SHARDED_STATE_DICT": "sharded"}
NUMBERED = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2")
"""What is sharded, in the order of torch's numbers, from 1."""

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def fsdp_settings(name: str, value: Any) -> dict[str, Any] | None:
    """The value of `fsdp_config` as it is kept: a dictionary whose names are without `fsdp_`, also from JSON text or a JSON file.

    >>> fsdp_settings("fsdp_config", '{"fsdp_min_num_params": 2000, "xla": false}')
    {'min_num_params': 2000, 'xla': False}
    """
    if value is None:
        return None
    if isinstance(value, (str, Path)):
        value = dict_from_text(name, str(value)) if str(value).lstrip().startswith("{") else _read(name, value)
    if not isinstance(value, dict):
        raise ArgumentError(f"{name}={value!r} must be a dict, JSON text, or the path of a JSON file.")
    settings = {key.removeprefix("fsdp_"): item for key, item in value.items()}
    check_names(name, settings, SETTINGS)
    for key, item in settings.items():
        SETTINGS[key](f"{name}: {key}", item)  # raises where it cannot work
    return settings


def plain(value: Any) -> Any:
    """A boolean or a whole number that was written as a text."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if value.isdigit() else value


def _flag(name: str, value: Any) -> bool | None:
    value = plain(value)
    if value is None or isinstance(value, bool):
        return value
    raise ArgumentError(f"{name}={value!r} must be True or False.")


def _version(name: str, value: Any) -> int:
    if plain(value) not in (1, 2):
        raise ArgumentError(f"{name}={value!r} must be 1 or 2.")
    return int(value)


def _count(name: str, value: Any) -> int:
    return check_whole(name, plain(value), 0)


def _kind(name: str, value: Any) -> FSDPOption:
    value = getattr(value, "name", value)  # torch's ShardingStrategy
    if str(value) in map(str, range(1, 6)):
        value = NUMBERED[int(value) - 1]
    return FSDPOption(check_one_of(name, str(value).lower(), NUMBERED))


def _reshard(name: str, value: Any) -> Any:
    value = plain(value)
    return value if value is None or isinstance(value, bool) else _kind(name, value)


def _texts(name: str, value: Any) -> tuple[str, ...] | None:
    items = value.split(",") if isinstance(value, str) else value
    if items is None:
        return None
    if not isinstance(items, (list, tuple, set)):
        raise ArgumentError(f"{name}={value!r} must be a name, or a list of names.")
    return tuple(check_text(name, item.strip() if isinstance(item, str) else item) for item in items) or None


def _patterns(name: str, value: Any) -> tuple[str, ...] | None:
    return (value,) if isinstance(value, str) else _texts(name, value)  # a regular expression may hold a comma


def _wrap(name: str, value: Any) -> str | None:
    return None if value is None else check_one_of(name, str(value).upper(), WRAPS)


def _state(name: str, value: Any) -> str:
    value = getattr(value, "name", value)  # torch's StateDictType
    return STATES[check_one_of(name, str(value).upper(), STATES)]


def _dtype(name: str, value: Any) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    return DTYPES[check_one_of(name, str(value).removeprefix("torch."), DTYPES)]


def _precision(name: str, value: Any) -> dict[str, Any] | None:
    """Of a word for all, a dictionary, or an object of torch's or accelerate's."""
    if value is None:
        return None
    if isinstance(value, (str, torch.dtype)):
        return dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), _dtype(name, value))
    known = ("param_dtype", "reduce_dtype", "output_dtype", "buffer_dtype", "cast_forward_inputs")
    given = value if isinstance(value, dict) else {key: getattr(value, key) for key in known if hasattr(value, key)}
    check_names(name, given, known)
    if given.get("buffer_dtype") is not None:
        raise ArgumentError(
            f"{name}: buffer_dtype={given['buffer_dtype']!r}: FSDP2 leaves buffers as they are. Convert them yourself."
        )
    policy: dict[str, Any] = {key: _dtype(f"{name}: {key}", given[key]) for key in known[:3] if key in given}
    cast_inputs = _flag(f"{name}: cast_forward_inputs", given.get("cast_forward_inputs"))
    return policy | ({} if cast_inputs is None else {"cast_forward_inputs": cast_inputs})


def _prefetch(name: str, value: Any) -> Any:
    value = getattr(value, "name", value)
    return None if value is None else check_one_of(name, str(value).lower(), ("backward_pre", "backward_post", "no_prefetch"))


def _not_here(remedy: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if plain(value):
            raise ArgumentError(f"{name}={value!r} {remedy}")

    return check


_NO_TPU = _not_here("is for TPUs, which are not supported. Leave it out.")

SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "version": _version,
    "auto_wrap_policy": _wrap,
    "transformer_layer_cls_to_wrap": _texts,
    "transformer_cls_names_to_wrap": _texts,
    "min_num_params": _count,
    "sharding_strategy": _kind,
    "reshard_after_forward": _reshard,
    "cpu_offload": _flag,
    "offload_params": _flag,
    "state_dict_type": _state,
    "mixed_precision_policy": _precision,
    "mixed_precision": _precision,
    "activation_checkpointing": _flag,
    "activation_checkpointing_offload": _flag,
    "cpu_ram_efficient_loading": _flag,
    "ignored_modules": _patterns,
    "sync_module_states": _flag,
    "use_orig_params": _flag,
    "forward_prefetch": _flag,
    "backward_prefetch": _prefetch,
    "limit_all_gathers": _flag,
    "xla": _NO_TPU,
    "xla_fsdp_v2": _NO_TPU,
    "xla_fsdp_grad_ckpt": _NO_TPU,
    "xla_fsdp_settings": _NO_TPU,
}
"""Name in `fsdp_config` -> what reads its value."""


def _read(name: str, path: str | Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{name}={str(path)!r} is no readable JSON file ({error}). Give the path of one, or a dict."
        ) from error
