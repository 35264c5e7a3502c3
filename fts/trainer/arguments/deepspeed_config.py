"""DeepSpeed's configuration: where it is found, and what the arguments say for its "auto" values.

The names are those of https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fts.errors import ArgumentError
from fts.trainer.arguments.parsing import ON

if TYPE_CHECKING:
    from fts.trainer.arguments.training_arguments import TrainingArguments

AUTO = "auto"

FROM_ARGUMENTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", lambda args: args.per_device_train_batch_size),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", lambda args: args.gradient_accumulation_steps),
    "gradient_clipping": ("max_grad_norm", lambda args: args.max_grad_norm),
    "optimizer.params.lr": ("learning_rate", lambda args: args.learning_rate),
    "optimizer.params.betas": ("[adam_beta1, adam_beta2]", lambda args: [args.adam_beta1, args.adam_beta2]),
    "optimizer.params.eps": ("adam_epsilon", lambda args: args.adam_epsilon),
    "optimizer.params.weight_decay": ("weight_decay", lambda args: args.weight_decay),
    "scheduler.params.warmup_max_lr": ("learning_rate", lambda args: args.learning_rate),
    "fp16.enabled": ("fp16", lambda args: args.mixed_precision == "fp16"),
    "bf16.enabled": ("bf16", lambda args: args.mixed_precision == "bf16"),
}
"""Key of the configuration -> the argument that says the same, and its value."""

LEFT_OUT = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "fp16.enabled", "bf16.enabled")
"""Keys that the arguments fill in where the configuration does not have them at all."""

BATCHES = ("train_micro_batch_size_per_gpu", "train_batch_size")
"""Keys that may differ from the arguments where a batch size that fits is to be found."""


def config_of(deepspeed: Any, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """DeepSpeed's configuration as the argument, or else the environment of `accelerate launch`, gives it; None for neither.

    Args:
        deepspeed: the argument: a dictionary, or the path of a JSON file.
        environ: variables of the environment.

    Returns:
        A copy, in which values may still be "auto".

    Raises:
        ArgumentError: it cannot be read.

    >>> config_of(None, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})["zero_optimization"]
    {'stage': 3}
    """
    if deepspeed:
        return _read("deepspeed", deepspeed)
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ON:
        return None
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return _of_launcher(environ) if path.lower() == "none" else _read("ACCELERATE_DEEPSPEED_CONFIG_FILE", path)


def filled(
    config: Mapping[str, Any],
    args: TrainingArguments,
    world: int,
    *,
    batch_size: int | None = None,
    auto_find_batch_size: bool = False,
) -> dict[str, Any]:
    """The configuration with what the arguments say: for "auto" values, and for the main ones that it leaves out.

    Args:
        config: is not changed.
        args: the arguments.
        world: how many processes there are.
        batch_size: rows of a micro-batch, where they are not those of the arguments.
        auto_find_batch_size: whether batch sizes may differ from the arguments.

    Returns:
        A new dictionary; what depends on the model or the length of the run stays "auto" (see `settled`).

    Raises:
        ArgumentError: it says something else than the arguments.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> args = TrainingArguments(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    >>> filled({"train_batch_size": "auto", "zero_optimization": {"stage": 2}}, args, world=2)["train_batch_size"]
    16
    >>> filled({"gradient_clipping": 0.5}, args, world=2)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: DeepSpeed's configuration contradicts the arguments: gradient_clipping=0.5, but max_grad_norm=...
    """
    found = copy.deepcopy(dict(config))
    size = args.per_device_train_batch_size if batch_size is None else batch_size
    values = {key: (name, value(args)) for key, (name, value) in FROM_ARGUMENTS.items()}
    values["train_micro_batch_size_per_gpu"] = ("per_device_train_batch_size", size)
    rows = size * args.gradient_accumulation_steps * world
    values["train_batch_size"] = ("per_device_train_batch_size * gradient_accumulation_steps * processes", rows)
    for key in LEFT_OUT:
        if _get(found, key) is None:
            _set(found, key, values[key][1])
    _fill(found, values, free=BATCHES if auto_find_batch_size else ())
    if _get(found, "scheduler.params.warmup_min_lr") == AUTO:
        _set(found, "scheduler.params.warmup_min_lr", 0)
    if args.save_on_each_node:
        found.setdefault("checkpoint", {})["use_node_local_storage"] = True
    return found


def settled(config: Mapping[str, Any], args: TrainingArguments, *, total_steps: int, hidden_size: int | None) -> dict[str, Any]:
    """The configuration with what depends on the length of the run and on the model, too; nothing is "auto" any more.

    Args:
        config: what `filled` made; it is not changed.
        args: the arguments.
        total_steps: updates in the run.
        hidden_size: the width of the model, from which the sizes of buckets follow; None where it has none.

    Raises:
        ArgumentError: it says something else than the arguments, or a value is "auto" that nobody can tell.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> scheduler = {"params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}
    >>> settled({"scheduler": scheduler}, TrainingArguments(warmup_steps=0.1), total_steps=50, hidden_size=None)["scheduler"]
    {'params': {'total_num_steps': 50, 'warmup_num_steps': 5}}
    """
    found = copy.deepcopy(dict(config))
    warmup = max(1, args.get_warmup_steps(total_steps))  # DeepSpeed takes none below 1
    values: dict[str, tuple[str, Any]] = {
        "scheduler.params.total_num_steps": ("the updates of the run", total_steps),
        "scheduler.params.warmup_num_steps": ("warmup_steps", warmup),
    }
    _fill(found, values)
    if hidden_size is not None:
        sizes = {
            "reduce_bucket_size": hidden_size**2,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        for name, number in sizes.items():
            if _get(found, f"zero_optimization.{name}") == AUTO:
                _set(found, f"zero_optimization.{name}", number)
    left = list(_autos(found))
    if left:
        raise ArgumentError(
            f"DeepSpeed's configuration has {', '.join(left)} = 'auto', which the arguments do not tell, nor a hidden_size in "
            "the model's configuration. Give numbers there."
        )
    return found


def _fill(config: dict[str, Any], values: Mapping[str, tuple[str, Any]], free: tuple[str, ...] = ()) -> None:
    wrong = []
    for key, (name, value) in values.items():
        said = _get(config, key)
        if said == AUTO or (said is not None and key in free):
            _set(config, key, value)
        elif said is not None and said != value:
            wrong.append(f"{key}={said!r}, but {name}={value!r}")
    if wrong:
        raise ArgumentError(
            f"DeepSpeed's configuration contradicts the arguments: {'; '.join(wrong)}. Make them equal, or write 'auto' in the "
            "configuration."
        )


def _get(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
    config[last] = value


def _autos(config: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _autos(value, f"{before}{key}.")
        elif value == AUTO:
            yield f"{before}{key}"


def _read(name: str, given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given))
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{name}={str(given)!r} cannot be read: {error}. Give the path of DeepSpeed's JSON file.") from error
    except ValueError as error:
        raise ArgumentError(f"{name}={str(given)!r} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{name}={str(given)!r} holds a {type(found).__name__}; DeepSpeed's configuration is a dictionary.")
    return found


def _of_launcher(environ: Mapping[str, str]) -> dict[str, Any]:
    """The configuration that `accelerate launch --use_deepspeed` describes by variables of its own."""
    zero: dict[str, Any] = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))}
    for what in ("optimizer", "param"):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}"
        device = environ.get(f"{variable}_DEVICE", "none").lower()
        if device != "none":
            path = environ.get(f"{variable}_NVME_PATH")
            zero[f"offload_{what}"] = {"device": device} | ({"nvme_path": path} if device == "nvme" and path else {})
    config: dict[str, Any] = {"train_batch_size": AUTO, "train_micro_batch_size_per_gpu": AUTO, "zero_optimization": zero}
    said = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", AUTO)
    config["gradient_accumulation_steps"] = int(said) if said.isdigit() else said
    clipping = environ.get("ACCELERATE_GRADIENT_CLIPPING", AUTO)
    config["gradient_clipping"] = clipping if clipping == AUTO else float(clipping)
    return config
