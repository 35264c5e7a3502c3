"""What a tracker is told about a run when it begins: arguments, plan, model and environment, without secrets."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import attrs
import torch

PACKAGES = ("fts", "torch", "accelerate", "numpy", "transformers", "datasets", "peft", "safetensors")
SECRET = re.compile(
    r"(^|[/_.-])(token|tokens|secret|password|passwd|credentials?|(api|access|secret|private)_?key)$", re.IGNORECASE
)
LOGIN = re.compile(r"//[^/@\s]*@")


def facts_of(args: Any, plan: Any = None, model: Any = None) -> dict[str, bool | int | float | str]:
    """All that a tracker keeps of a run beside its figures, as plain values by name.

    The arguments have their own names; those of the rest begin with `plan/`, `model/` and `environment/`. What is called a token,
    key, secret or password is left out, and a login in an address is masked.

    Args:
        args: the arguments.
        plan: what they come to; None before training.
        model: its configuration is told if it has one, and how many numbers it has.

    >>> from fts.trainer import TrainingArguments
    >>> facts = facts_of(TrainingArguments(hub_token="sesame", output_dir="s3://me:sesame@store/runs"))
    >>> facts["output_dir"], "hub_token" in facts, facts["environment/torch"] == torch.__version__
    ('s3://***@store/runs', False, True)
    """
    found = dict(args.to_sanitized_dict())
    found |= _under("plan", {} if plan is None else attrs.asdict(plan, filter=lambda field, value: field.name != "schedule"))
    found |= _under("model", {} if model is None else _of_model(model))
    found |= _under("environment", _of_environment(args))
    return {name: _plain(value) for name, value in found.items() if not SECRET.search(name)}


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _of_model(model: Any) -> dict[str, Any]:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    described = to_dict() if callable(to_dict) else {}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    return {**described, "class": type(model).__name__, "num_parameters": every, "num_trainable_parameters": trained}


def _of_environment(args: Any) -> dict[str, Any]:
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {package: _version(package) for package in PACKAGES}
    found = {"python": platform.python_version(), "platform": platform.platform(), "device": name, "world_size": args.world_size}
    return found | {package: text for package, text in versions.items() if text is not None}


def _version(package: str) -> str | None:
    try:
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return None


def _plain(value: Any) -> bool | int | float | str:
    return value if type(value) in (bool, int, float) else LOGIN.sub("//***@", str(_without_secrets(value)))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_secrets(item) for key, item in value.items() if not SECRET.search(str(key))}
    return [_without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value
