"""Errors for unknown argument names, with suggestions."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments.checks import closest_name

SYNONYMS = {
    "batch_size": "per_device_train_batch_size",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "clip_grad_norm": "max_grad_norm",
    "epochs": "num_train_epochs",
    "eps": "adam_epsilon",
    "evaluation_strategy": "eval_strategy",
    "fsdp_min_num_params": "fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "include_inputs_for_metrics": "include_for_metrics",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "label_smoothing": "label_smoothing_factor",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "no_cuda": "use_cpu",
    "num_epochs": "num_train_epochs",
    "num_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_organization": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "scheduler": "lr_scheduler_type",
    "torchdynamo": "torch_compile_backend",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "wd": "weight_decay",
}
"""Names in older scripts or other libraries -> names of TrainingArguments."""

REMEDIES = {
    "batch_size": "For evaluation it is 'per_device_eval_batch_size'.",
    "fp16_backend": "It is gone: torch's own mixed precision is the only one. Leave it out.",
    "fp16_opt_level": "It is gone: torch's own mixed precision is the only one. Leave it out.",
    "half_precision_backend": "It is gone: torch's own mixed precision is the only one. Leave it out.",
    "include_inputs_for_metrics": "Use include_for_metrics=['inputs'].",
    "jit_mode_eval": "It is gone. Use torch_compile=True.",
    "logging_dir": "It is gone: set the directory in the callback that writes logs. Leave it out.",
    "mp_parameters": "It is gone. Leave it out.",
    "overwrite_output_dir": "It is gone: a run resumes only with Trainer.train(resume_from_checkpoint=...). Leave it out.",
    "push_to_hub_organization": "Use hub_model_id='organization/name'.",
    "ray_scope": "It is gone: pass it to Trainer.hyperparameter_search. Leave it out.",
    "tpu_num_cores": "It is gone. Leave it out.",
    "use_ipex": "It is gone. Leave it out.",
    "use_mps_device": "It is gone: an available accelerator is used. Leave it out.",
    "dispatch_batches": "Use accelerator_config={'dispatch_batches': ...}.",
    "split_batches": "Use accelerator_config={'split_batches': ...}.",
    "warmup_ratio": "A value below 1 is a share of all steps: warmup_steps=0.1.",
}
"""More advice about a name."""

PROPERTY_SOURCES = {
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "device": "use_cpu",
    "mixed_precision": "bf16 or fp16",
    "ddp_timeout_delta": "ddp_timeout",
}
"""Property -> the argument that determines it."""

_ATTRIBUTE_CUTOFF = 0.8  # a name assigned to an object may be the user's own: only a likely typing error is rejected


def unknown_name_error(owner: str, name: str, known: Iterable[str], cutoff: float = 0.6) -> ArgumentError | None:
    """The error for an unknown name; None if no known name is close to it and there is no advice about it."""
    known = list(known)
    closest = SYNONYMS[name] if SYNONYMS.get(name) in known else closest_name(name, known, cutoff)
    if name in REMEDIES and name not in SYNONYMS:
        return ArgumentError(f"{owner} has no argument {name!r}. {REMEDIES[name]}")
    if closest is None:
        return None
    advice = f" {REMEDIES[name]}" if name in REMEDIES else ""
    return ArgumentError(f"{owner} has no argument {name!r}. Did you mean {closest!r}?{advice}")


@cache
def _parameters(cls: type) -> tuple[frozenset[str], bool]:
    """The names that a class's constructor takes, and whether it takes any others."""
    taken = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return frozenset(item.name for item in taken), any(item.kind is item.VAR_KEYWORD for item in taken)


def check_constructor_names(cls: type, given: Iterable[str]) -> None:
    """Raise ArgumentError for a name that the constructor of a class does not take.

    For a subclass whose own `__init__` takes any name, only likely typing errors are rejected.
    """
    known, takes_any = _parameters(cls)
    fields = getattr(cls, "__dataclass_fields__", {}) if takes_any else ()
    known = (known | set(fields)) - {"self"}
    for name in given:
        if name in known:
            continue
        error = unknown_name_error(cls.__name__, name, sorted(known), _ATTRIBUTE_CUTOFF if takes_any else 0.6)
        if error is not None:
            raise error
        if not takes_any:
            raise ArgumentError(
                f"{cls.__name__} has no argument {name!r}, nor one with a similar name. "
                f"[f.name for f in dataclasses.fields({cls.__name__})] lists its arguments."
            )


def check_attribute_name(cls: type, name: str) -> None:
    """Raise ArgumentError for an attribute that cannot be set, or is probably a mistyped argument.

    Other names are the user's own: scripts attach values to the arguments.
    """
    fields: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
    existing = inspect.getattr_static(cls, name, None)
    if isinstance(existing, property) and existing.fset is None:
        hint = f" Set {PROPERTY_SOURCES[name]} instead." if name in PROPERTY_SOURCES else " Override the property in a subclass."
        raise ArgumentError(f"{cls.__name__}.{name} follows from other arguments and cannot be set.{hint}")
    if name in fields or hasattr(cls, name) or any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__):
        return
    error = unknown_name_error(cls.__name__, name, fields, _ATTRIBUTE_CUTOFF)
    if error is not None:
        raise ArgumentError(f"{error} For an attribute of your own, declare it in a @dataclass subclass, or begin it with '_'.")
