"""The configuration of a run that trackers store: arguments, plan, model and environment, without secrets."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import attrs
import torch

from fts.messages import DISTRIBUTION

PACKAGES = ("fts", "torch", "accelerate", "numpy", "transformers", "datasets", "peft", "safetensors")
SECRET = re.compile(
    r"(^|[/_.-])(token|tokens|secret|password|passwd|credentials?|(api|access|secret|private)_?key)$", re.IGNORECASE
)
LOGIN_IN_URL = re.compile(r"//[^/@\s]*@")


def run_config(args: Any, plan: Any = None, model: Any = None) -> dict[str, bool | int | float | str]:
    """The configuration of a run, as plain values by name.

    The arguments have their own names; the other names begin with `plan/`, `model/` and `environment/`. Tokens, keys, secrets and
    passwords are left out by name, and a login in a URL is masked.

    Args:
        args: the arguments.
        plan: the plan of the run; None before training.
        model: its configuration, if any, and its numbers of parameters.

    >>> from fts.trainer import TrainingArguments
    >>> config = run_config(TrainingArguments(hub_token="sesame", output_dir="s3://me:sesame@store/runs"))
    >>> config["output_dir"], "hub_token" in config, config["environment/torch"] == torch.__version__
    ('s3://***@store/runs', False, True)
    """
    config = dict(args.to_sanitized_dict())
    config |= _prefixed("plan", {} if plan is None else attrs.asdict(plan, filter=lambda field, value: field.name != "schedule"))
    config |= _prefixed("model", {} if model is None else _model_config(model))
    config |= _prefixed("environment", _environment(args))
    return {name: _plain_value(value) for name, value in config.items() if not SECRET.search(name)}


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _model_config(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    values = to_dict() if callable(to_dict) else {}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {**values, "class": type(model).__name__, "num_parameters": total, "num_trainable_parameters": trainable}


def _environment(args: Any) -> dict[str, Any]:
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {package: _version(package) for package in PACKAGES}
    values = {"python": platform.python_version(), "platform": platform.platform(), "device": name, "world_size": args.world_size}
    return values | {package: text for package, text in versions.items() if text is not None}


def _version(package: str) -> str | None:
    try:
        return torch.__version__ if package == "torch" else version(DISTRIBUTION if package == "fts" else package)
    except PackageNotFoundError:
        return None


def _plain_value(value: Any) -> bool | int | float | str:
    return value if type(value) in (bool, int, float) else LOGIN_IN_URL.sub("//***@", str(_without_secrets(value)))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_secrets(item) for key, item in value.items() if not SECRET.search(str(key))}
    return [_without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value
