"""`deepspeed` and what `accelerate launch` says of it, as one configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fts.distributed.strategies import DeepSpeed
from fts.errors import ArgumentError
from fts.trainer.arguments.texts import ON, dict_from_text

if TYPE_CHECKING:
    from fts.trainer.arguments.training import TrainingArguments


def deepspeed_config(name: str, value: Any) -> dict[str, Any] | None:
    """The value of `deepspeed` as it is kept: a dictionary, also from JSON text or a JSON file; None for nothing.

    >>> deepspeed_config("deepspeed", '{"zero_optimization": {"stage": 2}}')
    {'zero_optimization': {'stage': 2}}
    """
    if not value:
        return None
    if isinstance(value, (str, Path)):
        value = dict_from_text(name, str(value)) if str(value).lstrip().startswith("{") else _read(name, value)
    if not isinstance(value, dict):
        raise ArgumentError(f"{name}={value!r} must be a dict, JSON text, or the path of a JSON file.")
    stage = value.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ArgumentError(f"{name}: zero_optimization: stage={stage!r} must be 0, 1, 2 or 3.")
    return value


def deepspeed_of(args: TrainingArguments, environ: Mapping[str, str]) -> DeepSpeed | None:
    """The strategy that the argument asks for, or else `accelerate launch --use_deepspeed`; None if neither does.

    Args:
        args: the arguments.
        environ: variables of the environment.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> deepspeed_of(TrainingArguments(), {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}).stage
    3
    """
    if isinstance(args.deepspeed, dict) and args.deepspeed:
        return DeepSpeed(args.deepspeed)
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ON:
        return None
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path.lower() != "none":
        return DeepSpeed(deepspeed_config("ACCELERATE_DEEPSPEED_CONFIG_FILE", path) or {})
    return DeepSpeed(_of_variables(environ))


def _of_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    def said(name: str) -> str | None:
        value = environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none")
        return None if value.lower() == "none" else value

    zero: dict[str, Any] = {"stage": int(said("ZERO_STAGE") or 2)}
    for what in ("optimizer", "param"):
        device, path = said(f"OFFLOAD_{what.upper()}_DEVICE"), said(f"OFFLOAD_{what.upper()}_NVME_PATH")
        if device:
            zero[f"offload_{what}"] = {"device": device} | ({"nvme_path": path} if path else {})
    zero["stage3_gather_16bit_weights_on_model_save"] = (said("ZERO3_SAVE_16BIT_MODEL") or "false").lower() == "true"
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(auto, "auto") | {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}


def _read(name: str, path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{name}={str(path)!r} is no readable JSON file ({error}). Give the path of one, or a dict."
        ) from error
