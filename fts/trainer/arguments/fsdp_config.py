"""The settings in `fsdp_config`: a table of names, each with the parser of its value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from fts.errors import ArgumentError
from fts.trainer.arguments.checks import check_int, check_known_names, check_one_of, check_str
from fts.trainer.arguments.enums import FSDPOption
from fts.trainer.arguments.parsing import parse_json_dict

AUTO_WRAP_POLICIES = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
STATE_DICT_TYPES = {"FULL_STATE_DICT": "full", "SHARDED_STATE_DICT": "sharded"}
SHARDING_STRATEGY_NAMES = ("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2")
"""The sharding strategies in the order of torch's numbers, from 1."""

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def parse_fsdp_config(name: str, value: Any) -> dict[str, Any] | None:
    """The value of `fsdp_config` to store: a dictionary of names without `fsdp_`, also from JSON or a JSON file.

    >>> parse_fsdp_config("fsdp_config", '{"fsdp_min_num_params": 2000, "xla": false}')
    {'min_num_params': 2000, 'xla': False}
    """
    if value is None:
        return None
    if isinstance(value, (str, Path)):
        value = parse_json_dict(name, str(value)) if str(value).lstrip().startswith("{") else _read(name, value)
    if not isinstance(value, dict):
        raise ArgumentError(f"{name}={value!r} must be a dict, JSON, or the path of a JSON file.")
    settings = {key.removeprefix("fsdp_"): item for key, item in value.items()}
    check_known_names(name, settings, SETTINGS)
    for key, item in settings.items():
        SETTINGS[key](f"{name}: {key}", item)  # raises where it cannot work
    return settings


def parse_scalar(value: Any) -> Any:
    """The boolean or integer that a string spells; other values as they are."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if value.isdigit() else value


def _flag(name: str, value: Any) -> bool | None:
    value = parse_scalar(value)
    if value is None or isinstance(value, bool):
        return value
    raise ArgumentError(f"{name}={value!r} must be True or False.")


def _version(name: str, value: Any) -> int:
    if parse_scalar(value) not in (1, 2):
        raise ArgumentError(f"{name}={value!r} must be 1 or 2.")
    return int(value)


def _num_params(name: str, value: Any) -> int:
    return check_int(name, parse_scalar(value), 0)


def _sharding_strategy(name: str, value: Any) -> FSDPOption:
    value = getattr(value, "name", value)  # torch's ShardingStrategy
    if str(value) in map(str, range(1, 6)):
        value = SHARDING_STRATEGY_NAMES[int(value) - 1]
    return FSDPOption(check_one_of(name, str(value).lower(), SHARDING_STRATEGY_NAMES))


def _reshard_after_forward(name: str, value: Any) -> Any:
    value = parse_scalar(value)
    return value if value is None or isinstance(value, bool) else _sharding_strategy(name, value)


def _class_names(name: str, value: Any) -> tuple[str, ...] | None:
    names = value.split(",") if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, (list, tuple, set)):
        raise ArgumentError(f"{name}={value!r} must be a name, or a list of names.")
    return tuple(check_str(name, item.strip() if isinstance(item, str) else item) for item in names) or None


def _patterns(name: str, value: Any) -> tuple[str, ...] | None:
    return (value,) if isinstance(value, str) else _class_names(name, value)  # a regular expression may contain a comma


def _auto_wrap_policy(name: str, value: Any) -> str | None:
    return None if value is None else check_one_of(name, str(value).upper(), AUTO_WRAP_POLICIES)


def _state_dict_type(name: str, value: Any) -> str:
    value = getattr(value, "name", value)  # torch's StateDictType
    return STATE_DICT_TYPES[check_one_of(name, str(value).upper(), STATE_DICT_TYPES)]


def _dtype(name: str, value: Any) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    return DTYPES[check_one_of(name, str(value).removeprefix("torch."), DTYPES)]


def _mixed_precision(name: str, value: Any) -> dict[str, Any] | None:
    """From one dtype for all, a dictionary, or a policy object of torch or accelerate."""
    if value is None:
        return None
    if isinstance(value, (str, torch.dtype)):
        return dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), _dtype(name, value))
    known = ("param_dtype", "reduce_dtype", "output_dtype", "buffer_dtype", "cast_forward_inputs")
    given = value if isinstance(value, dict) else {key: getattr(value, key) for key in known if hasattr(value, key)}
    check_known_names(name, given, known)
    if given.get("buffer_dtype") is not None:
        raise ArgumentError(
            f"{name}: buffer_dtype={given['buffer_dtype']!r}: FSDP2 leaves buffers as they are. Convert them yourself."
        )
    policy: dict[str, Any] = {key: _dtype(f"{name}: {key}", given[key]) for key in known[:3] if key in given}
    cast_inputs = _flag(f"{name}: cast_forward_inputs", given.get("cast_forward_inputs"))
    return policy | ({} if cast_inputs is None else {"cast_forward_inputs": cast_inputs})


def _backward_prefetch(name: str, value: Any) -> Any:
    value = getattr(value, "name", value)
    return None if value is None else check_one_of(name, str(value).lower(), ("backward_pre", "backward_post", "no_prefetch"))


def _unsupported(remedy: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if parse_scalar(value):
            raise ArgumentError(f"{name}={value!r} {remedy}")

    return check


_TPU_ONLY = _unsupported("is for TPUs, which are not supported. Leave it out.")

SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "version": _version,
    "auto_wrap_policy": _auto_wrap_policy,
    "transformer_layer_cls_to_wrap": _class_names,
    "transformer_cls_names_to_wrap": _class_names,
    "min_num_params": _num_params,
    "sharding_strategy": _sharding_strategy,
    "reshard_after_forward": _reshard_after_forward,
    "cpu_offload": _flag,
    "offload_params": _flag,
    "state_dict_type": _state_dict_type,
    "mixed_precision_policy": _mixed_precision,
    "mixed_precision": _mixed_precision,
    "activation_checkpointing": _flag,
    "activation_checkpointing_offload": _flag,
    "cpu_ram_efficient_loading": _flag,
    "ignored_modules": _patterns,
    "sync_module_states": _flag,
    "use_orig_params": _flag,
    "forward_prefetch": _flag,
    "backward_prefetch": _backward_prefetch,
    "limit_all_gathers": _flag,
    "xla": _TPU_ONLY,
    "xla_fsdp_v2": _TPU_ONLY,
    "xla_fsdp_grad_ckpt": _TPU_ONLY,
    "xla_fsdp_settings": _TPU_ONLY,
}
"""Name in `fsdp_config` -> the parser of its value."""


def _read(name: str, path: str | Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{name}={str(path)!r} is no readable JSON file ({error}). Give the path of one, or a dict."
        ) from error
