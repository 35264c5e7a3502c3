"""DeepSpeed's configuration: how it is read, and the arguments' values for its "auto" entries.

The names are those of https://www.deepspeed.ai/docs/config-json/.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fts.errors import ArgumentError
from fts.trainer.arguments.parsing import TRUE_VALUES

AUTO = "auto"


class DeepSpeedArguments(Protocol):
    """The arguments that DeepSpeed's configuration may repeat."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    learning_rate: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    weight_decay: float
    save_on_each_node: bool

    @property
    def mixed_precision(self) -> str:
        """The precision: "no", "bf16" or "fp16"."""

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Over how many of so many updates the learning rate rises."""


FROM_ARGUMENTS: dict[str, tuple[str, Callable[[DeepSpeedArguments], Any]]] = {
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
"""Key of the configuration -> the argument with the same meaning, and its value."""

FILLED_WHEN_ABSENT = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16.enabled",
    "bf16.enabled",
)
"""Keys that are filled in from the arguments also where the configuration lacks them."""

BATCH_SIZE_KEYS = ("train_micro_batch_size_per_gpu", "train_batch_size")
"""Keys that may differ from the arguments with `auto_find_batch_size`."""


def load_deepspeed_config(deepspeed: Any, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """DeepSpeed's configuration from the argument, or else from the environment of `accelerate launch`; None without either.

    Args:
        deepspeed: the argument: a dictionary, or the path of a JSON file.
        environ: variables of the environment.

    Returns:
        A copy, in which values may still be "auto".

    Raises:
        ArgumentError: it cannot be read.

    >>> environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    >>> load_deepspeed_config(None, environ)["zero_optimization"]
    {'stage': 3}
    """
    if deepspeed:
        return _read("deepspeed", deepspeed)
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in TRUE_VALUES:
        return None
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return _config_from_environment(environ) if path.lower() == "none" else _read("ACCELERATE_DEEPSPEED_CONFIG_FILE", path)


def fill_deepspeed_config(
    config: Mapping[str, Any],
    args: DeepSpeedArguments,
    world_size: int,
    *,
    batch_size: int | None = None,
    auto_find_batch_size: bool = False,
) -> dict[str, Any]:
    """Fill in the arguments' values: for "auto" entries, and for the main ones that are absent.

    Args:
        config: it is not changed.
        args: the arguments.
        world_size: how many processes there are.
        batch_size: examples of a micro-batch, if other than in the arguments.
        auto_find_batch_size: whether batch sizes may differ from the arguments.

    Returns:
        A new dictionary; what depends on the model or the length of the run stays "auto" until `finalize_deepspeed_config`.

    Raises:
        ArgumentError: it contradicts the arguments.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> args = TrainingArguments(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    >>> fill_deepspeed_config({"train_batch_size": "auto"}, args, world_size=2)["train_batch_size"]
    16
    >>> fill_deepspeed_config({"gradient_clipping": 0.5}, args, world_size=2)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: DeepSpeed's configuration contradicts the arguments: gradient_clipping=0.5, but max_grad_norm=...
    """
    found = copy.deepcopy(dict(config))
    size = args.per_device_train_batch_size if batch_size is None else batch_size
    values = {key: (name, value(args)) for key, (name, value) in FROM_ARGUMENTS.items()}
    values["train_micro_batch_size_per_gpu"] = ("per_device_train_batch_size", size)
    total = size * args.gradient_accumulation_steps * world_size
    values["train_batch_size"] = ("per_device_train_batch_size * gradient_accumulation_steps * processes", total)
    for key in FILLED_WHEN_ABSENT:
        if _get(found, key) is None:
            _set(found, key, values[key][1])
    _fill_auto(found, values, replaceable=BATCH_SIZE_KEYS if auto_find_batch_size else ())
    if _get(found, "scheduler.params.warmup_min_lr") == AUTO:
        _set(found, "scheduler.params.warmup_min_lr", 0)
    if args.save_on_each_node:
        found.setdefault("checkpoint", {})["use_node_local_storage"] = True
    return found


def finalize_deepspeed_config(
    config: Mapping[str, Any], args: DeepSpeedArguments, *, total_steps: int, hidden_size: int | None
) -> dict[str, Any]:
    """Fill in what depends on the length of the run and on the model; nothing stays "auto".

    Args:
        config: the result of `fill_deepspeed_config`; it is not changed.
        args: the arguments.
        total_steps: updates in the run.
        hidden_size: the width of the model, which sets the sizes of buckets; None where it has none.

    Raises:
        ArgumentError: it contradicts the arguments, or an "auto" value is unknown.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> scheduler = {"params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}
    >>> args = TrainingArguments(warmup_steps=0.1)
    >>> finalize_deepspeed_config({"scheduler": scheduler}, args, total_steps=50, hidden_size=None)["scheduler"]
    {'params': {'total_num_steps': 50, 'warmup_num_steps': 5}}
    """
    found = copy.deepcopy(dict(config))
    warmup = max(1, args.get_warmup_steps(total_steps))  # DeepSpeed takes none below 1
    values: dict[str, tuple[str, Any]] = {
        "scheduler.params.total_num_steps": ("the updates of the run", total_steps),
        "scheduler.params.warmup_num_steps": ("warmup_steps", warmup),
    }
    _fill_auto(found, values)
    if hidden_size is not None:
        sizes = {
            "reduce_bucket_size": hidden_size**2,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
        for name, number in sizes.items():
            if _get(found, f"zero_optimization.{name}") == AUTO:
                _set(found, f"zero_optimization.{name}", number)
    unresolved = list(_auto_keys(found))
    if unresolved:
        raise ArgumentError(
            f"DeepSpeed's configuration has {', '.join(unresolved)} = 'auto', which neither the arguments nor a hidden_size in "
            "the model's configuration determine. Give numbers there."
        )
    return found


def _fill_auto(config: dict[str, Any], values: Mapping[str, tuple[str, Any]], replaceable: tuple[str, ...] = ()) -> None:
    conflicts = []
    for key, (name, value) in values.items():
        given = _get(config, key)
        if given == AUTO or (given is not None and key in replaceable):
            _set(config, key, value)
        elif given is not None and given != value:
            conflicts.append(f"{key}={given!r}, but {name}={value!r}")
    if conflicts:
        raise ArgumentError(
            f"DeepSpeed's configuration contradicts the arguments: {'; '.join(conflicts)}. Make them equal, or write "
            "'auto' in the configuration."
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


def _auto_keys(config: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _auto_keys(value, f"{before}{key}.")
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
        raise ArgumentError(f"{name}={str(given)!r} holds a {type(found).__name__}; it must hold an object.")
    return found


def _config_from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The configuration that `accelerate launch --use_deepspeed` sets by environment variables."""
    zero: dict[str, Any] = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))}
    for what in ("optimizer", "param"):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}"
        device = environ.get(f"{variable}_DEVICE", "none").lower()
        if device != "none":
            path = environ.get(f"{variable}_NVME_PATH")
            zero[f"offload_{what}"] = {"device": device} | ({"nvme_path": path} if device == "nvme" and path else {})
    config: dict[str, Any] = {"train_batch_size": AUTO, "train_micro_batch_size_per_gpu": AUTO, "zero_optimization": zero}
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", AUTO)
    config["gradient_accumulation_steps"] = int(steps) if steps.isdigit() else steps
    clipping = environ.get("ACCELERATE_GRADIENT_CLIPPING", AUTO)
    config["gradient_clipping"] = clipping if clipping == AUTO else float(clipping)
    return config
