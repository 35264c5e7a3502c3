"""The validator of each argument: it checks a value and returns the one to store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from fts.errors import ArgumentError
from fts.loops.durations import parse_duration
from fts.trainer.arguments.accelerator_config import parse_accelerator_config
from fts.trainer.arguments.checks import check_bool, check_enum, check_float, check_int, check_interval, check_one_of, check_str
from fts.trainer.arguments.enums import DebugOption, HubStrategy, IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType
from fts.trainer.arguments.fsdp import parse_fsdp
from fts.trainer.arguments.fsdp_config import parse_fsdp_config
from fts.trainer.arguments.log_level import LOG_LEVELS
from fts.trainer.arguments.parallelism_config import parse_parallelism_config
from fts.trainer.arguments.parsing import format_key_values, parse_json_dict, parse_key_values
from fts.trainer.arguments.tracker_packages import TRACKERS

Validator = Callable[[str, Any], Any]

SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")
DDP_BACKENDS = ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl")
NONFINITE_POLICIES = ("raise", "skip", "rollback", "ignore")
START_METHODS = ("fork", "spawn", "forkserver")


def _flag(name: str, value: Any) -> bool:
    check_bool(name, value)
    return bool(value)


def _flag_or_none(name: str, value: Any) -> bool | None:
    check_bool(name, value, or_none=True)
    return None if value is None else bool(value)


def _or_none(check: Validator) -> Validator:
    return lambda name, value: None if value is None else check(name, value)


def _enum(choices: type[Enum]) -> Validator:
    return lambda name, value: check_enum(name, value, choices)


def _one_of(values: Iterable[str]) -> Validator:
    return lambda name, value: check_one_of(name, value, values)


def _int(low: int, remedy: str = "", *, bits: int = 0) -> Validator:
    return lambda name, value: check_int(name, value, low, remedy, bits=bits)


def _float(low: float = 0.0, high: float = float("inf"), *, open_low: bool = False) -> Validator:
    def validate(name: str, value: Any) -> Any:
        check_float(name, value, low, high, open_low=open_low)
        return value

    return validate


def _interval(name: str, value: Any) -> Any:
    check_interval(name, value, zero=True)
    return int(value) if value >= 1 else value


def _str(remedy: str = "") -> Validator:
    return lambda name, value: check_str(name, value, remedy)


def _duration(name: str, value: Any) -> str | float:
    """A duration as given; a timedelta in seconds, which JSON can represent."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
        value = float(value)  # from a command line
    try:
        seconds = parse_duration(value)
    except ArgumentError as error:
        raise ArgumentError(f"{name}={value!r}: {error}") from None
    if not 0 < seconds < float("inf"):
        raise ArgumentError(f"{name}={value!r} must be a duration above 0. Use None for no limit.")
    return value if isinstance(value, (str, int, float)) else seconds


def _output_dir(name: str, value: Any) -> str:
    if value is None:
        return "trainer_output"
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentError(f"{name}={value!r} must be the path of a directory.")
    return os.path.expanduser(os.fspath(value))


def _max_steps(name: str, value: Any) -> int:
    remedy = "Use -1 to train for num_train_epochs."
    return -1 if value == -1 and not isinstance(value, bool) else check_int(name, value, 1, remedy)


def parse_dict(name: str, value: Any) -> Any:
    """A dictionary, also from JSON text; None stays."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return parse_json_dict(name, value)
    if value is None or isinstance(value, dict):
        return value
    raise ArgumentError(f"{name}={value!r} must be a dict, or JSON text such as '{{\"key\": 1}}'.")


def _dict_or_path(name: str, value: Any) -> Any:
    return value if isinstance(value, str) and not value.lstrip().startswith("{") else parse_dict(name, value)


def _name_list(name: str, value: Any) -> list[str]:
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    raise ArgumentError(f"{name}={value!r} must be a list of names, such as {name}=['labels'].")


def _name_or_names(name: str, value: Any) -> Any:
    return check_str(name, value) if isinstance(value, str) else _name_list(name, value)


def _include_for_metrics(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)):
        raise ArgumentError(f"{name}={value!r} must be a list: of 'inputs', 'loss', or both.")
    return [check_one_of(name, item, ("inputs", "loss")) for item in value]


def _debug(name: str, value: Any) -> list[Any]:
    options = (value or "").split() if isinstance(value, str) or value is None else value
    if not isinstance(options, (list, tuple)):
        raise ArgumentError(f"{name}={value!r} must be a string of options, or a list of them.")
    return [check_enum(name, item, DebugOption) for item in options]


def _trackers(name: str, value: Any) -> list[str]:
    names = [] if value in (None, "none") else [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ArgumentError(f"{name}={value!r} must be a name or a list of names; 'none' for no tracker.")
    return [check_one_of(name, item, ("none", *TRACKERS)) for item in names if item != "none"]


def _tokens_seen(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "all" if value else "no"
    return check_one_of(name, value, ("all", "non_padding", "no"))


def _optim_args(name: str, value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_json_dict(name, value)
    if isinstance(value, dict):
        return format_key_values(name, value)
    parse_key_values(name, check_str(name, value, "Write pairs like 'rank=64,scale=0.1'."))
    return value


def _safetensors(name: str, value: Any) -> bool:
    if _flag(name, value):
        return True
    raise ArgumentError(f"{name}=False: fts writes safetensors only, since loading a pickle can run code. Leave it out.")


def _token(name: str, value: Any) -> str | None:
    if value == f"<{name.upper()}>":
        return None  # the mask that to_dict wrote
    return check_str(name, value)


def _static_space_id(name: str, value: Any) -> Any:
    return value if value is False else check_str(name, value)


def _metric(name: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ArgumentError(f"{name}={value!r} must be the name of an evaluation metric, such as 'loss'.")


def _generation_config(name: str, value: Any) -> Any:
    if isinstance(value, (str, os.PathLike)) or hasattr(value, "to_dict"):
        return value
    raise ArgumentError(f"{name}={value!r} must be a GenerationConfig, a model's name, or the path of a directory.")


FLAGS = (
    *("do_train", "do_eval", "do_predict", "average_tokens_across_devices", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval"),
    *("torch_compile", "use_liger_kernel", "use_cache", "auto_find_batch_size", "logging_first_step", "log_on_each_node"),
    *("logging_nan_inf_filter", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object"),
    *("batch_eval_metrics", "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "push_to_hub", "hub_always_push"),
    *("load_best_model_at_end", "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism", "use_cpu"),
    *("dataloader_drop_last", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("remove_unused_columns", "group_by_length", "skip_memory_metrics", "predict_with_generate", "sortish_sampler"),
    "async_save",
)
OPTIONAL_FLAGS = (
    *("tf32", "activation_checkpointing", "gradient_checkpointing", "disable_tqdm", "hub_private_repo", "greater_is_better"),
    *("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph"),
)
OPTIONAL_STRINGS = (
    *("torch_compile_backend", "torch_compile_mode", "run_name", "trackio_space_id", "trackio_bucket_id", "hub_model_id"),
    "hub_revision",
)
KWARGS_ARGUMENTS = (
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "liger_kernel_config",
)
DICT_ARGUMENTS = (*KWARGS_ARGUMENTS, "accelerator_config", "fsdp_config", "deepspeed")
"""Arguments that may be JSON."""

VALIDATORS: dict[str, Validator] = {
    **dict.fromkeys(FLAGS, _flag),
    **dict.fromkeys(OPTIONAL_FLAGS, _flag_or_none),
    **dict.fromkeys(OPTIONAL_STRINGS, _or_none(_str())),
    **dict.fromkeys(KWARGS_ARGUMENTS, parse_dict),
    "output_dir": _output_dir,
    "per_device_train_batch_size": _int(1),
    "per_device_eval_batch_size": _int(1),
    "gradient_accumulation_steps": _int(1),
    "num_train_epochs": _float(open_low=True),
    "max_steps": _max_steps,
    "learning_rate": _float(),
    "lr_scheduler_type": _enum(SchedulerType),
    "warmup_steps": _interval,
    "optim": _enum(OptimizerNames),
    "optim_args": _or_none(_optim_args),
    "optim_target_modules": _or_none(_name_or_names),
    "weight_decay": _float(),
    "adam_beta1": _float(0, 1),
    "adam_beta2": _float(0, 1),
    "adam_epsilon": _float(),
    "max_grad_norm": _float(),
    "label_smoothing_factor": _float(0, 1),
    "neftune_noise_alpha": _or_none(_float()),
    "torch_empty_cache_steps": _or_none(_int(1, "Use None to leave the cache alone.")),
    "logging_strategy": _enum(IntervalStrategy),
    "logging_steps": _interval,
    "include_num_input_tokens_seen": _tokens_seen,
    "log_level": _one_of((*LOG_LEVELS, "passive")),
    "log_level_replica": _one_of((*LOG_LEVELS, "passive")),
    "report_to": _trackers,
    "project": _str(),
    "trackio_static_space_id": _or_none(_static_space_id),
    "eval_strategy": _enum(IntervalStrategy),
    "eval_steps": _or_none(_interval),
    "eval_delay": lambda name, value: 0 if value is None else _float()(name, value),
    "eval_accumulation_steps": _or_none(_int(1, "Use None to keep predictions on the device.")),
    "include_for_metrics": _include_for_metrics,
    "save_strategy": _enum(SaveStrategy),
    "save_steps": _interval,
    "save_total_limit": _or_none(_int(1, "Use None to keep all, or save_strategy='no' to save none.")),
    "save_safetensors": _safetensors,
    "save_every": _or_none(_duration),
    "max_time": _or_none(_duration),
    "nonfinite": _one_of(NONFINITE_POLICIES),
    "nonfinite_limit": _int(1),
    "hub_token": _or_none(_token),
    "hub_strategy": _enum(HubStrategy),
    "metric_for_best_model": _or_none(_metric),
    "seed": _int(0, bits=63),
    "data_seed": _or_none(_int(0, bits=63)),
    "accelerator_config": parse_accelerator_config,
    "dataloader_num_workers": _int(0),
    "dataloader_prefetch_factor": _or_none(_int(1)),
    "dataloader_multiprocessing_context": _or_none(_one_of(START_METHODS)),
    "label_names": _or_none(_name_list),
    "train_sampling_strategy": _one_of(SAMPLING_STRATEGIES),
    "length_column_name": _str(),
    "ddp_bucket_cap_mb": _or_none(_int(1)),
    "ddp_backend": _or_none(_one_of(DDP_BACKENDS)),
    "ddp_timeout": _int(1, "It is in seconds."),
    "fsdp": parse_fsdp,
    "fsdp_config": parse_fsdp_config,
    "deepspeed": _dict_or_path,
    "parallelism_config": parse_parallelism_config,
    "debug": _debug,
    "resume_from_checkpoint": _or_none(lambda name, value: value if isinstance(value, bool) else _output_dir(name, value)),
    "local_rank": _int(-1),
    "generation_max_length": _or_none(_int(1)),
    "generation_num_beams": _or_none(_int(1)),
    "generation_config": _or_none(_generation_config),
}
"""Argument -> its validator."""
