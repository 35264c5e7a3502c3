"""Which names the arguments have, and what a wrong one should have been."""

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
"""Names that older scripts or other libraries use, and what they are called here."""

REMEDIES = {
    "batch_size": "For evaluation it is 'per_device_eval_batch_size'.",
    "fp16_backend": "It is gone: torch's own mixed precision is the only one. Leave it out.",
    "fp16_opt_level": "It is gone: torch's own mixed precision is the only one. Leave it out.",
    "half_precision_backend": "It is gone: torch's own mixed precision is the only one. Leave it out.",
    "include_inputs_for_metrics": "Use include_for_metrics=['inputs'].",
    "jit_mode_eval": "It is gone. Use torch_compile=True.",
    "logging_dir": "It is gone: where logs go is up to the callback that writes them. Leave it out.",
    "mp_parameters": "It is gone. Leave it out.",
    "overwrite_output_dir": "It is gone: a run goes on only if Trainer.train(resume_from_checkpoint=...) says so. Leave it out.",
    "push_to_hub_organization": "Use hub_model_id='organization/name'.",
    "ray_scope": "It is gone: give it to Trainer.hyperparameter_search. Leave it out.",
    "tpu_num_cores": "It is gone. Leave it out.",
    "use_ipex": "It is gone. Leave it out.",
    "use_mps_device": "It is gone: an accelerator that is there is used. Leave it out.",
    "dispatch_batches": "Use accelerator_config={'dispatch_batches': ...}.",
    "split_batches": "Use accelerator_config={'split_batches': ...}.",
    "warmup_ratio": "A value below 1 is a share of all steps: warmup_steps=0.1.",
}
"""What more to say about a name."""

PROPERTY_SOURCES = {
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "device": "use_cpu",
    "mixed_precision": "bf16 or fp16",
    "ddp_timeout_delta": "ddp_timeout",
}
"""Properties that follow from an argument."""

_NEAR = 0.8  # a name assigned to an object may be the user's own: only one that looks like a typing error is refused


def unknown_name_error(owner: str, name: str, known: Iterable[str], cutoff: float = 0.6) -> ArgumentError | None:
    """What to raise for a name that is not known, or None if nothing is near it and nothing is said about it."""
    known = list(known)
    near = SYNONYMS[name] if SYNONYMS.get(name) in known else closest_name(name, known, cutoff)
    if name in REMEDIES and name not in SYNONYMS:
        return ArgumentError(f"{owner} has no argument {name!r}. {REMEDIES[name]}")
    if near is None:
        return None
    more = f" {REMEDIES[name]}" if name in REMEDIES else ""
    return ArgumentError(f"{owner} has no argument {name!r}. Did you mean {near!r}?{more}")


@cache
def _parameters(cls: type) -> tuple[frozenset[str], bool]:
    """The names that a class's constructor takes, and whether it takes any other."""
    taken = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return frozenset(item.name for item in taken), any(item.kind is item.VAR_KEYWORD for item in taken)


def check_constructor_names(cls: type, given: Iterable[str]) -> None:
    """Raise ArgumentError for a name that the constructor of a class does not take.

    A subclass whose own `__init__` takes any name gets only those refused that look like a mistyped one.
    """
    known, open_end = _parameters(cls)
    fields = getattr(cls, "__dataclass_fields__", {}) if open_end else ()
    known = (known | set(fields)) - {"self"}
    for name in given:
        if name in known:
            continue
        error = unknown_name_error(cls.__name__, name, sorted(known), _NEAR if open_end else 0.6)
        if error is not None:
            raise error
        if not open_end:
            raise ArgumentError(
                f"{cls.__name__} has no argument {name!r}, and none with a name like it. "
                f"[f.name for f in dataclasses.fields({cls.__name__})] lists those that it has."
            )


def check_attribute_name(cls: type, name: str) -> None:
    """Raise ArgumentError for an attribute that cannot be set, or looks like a mistyped argument.

    Other names are the user's own, as scripts hang values on the arguments to carry them along.
    """
    fields: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
    there = inspect.getattr_static(cls, name, None)
    if isinstance(there, property) and there.fset is None:
        hint = f" Set {PROPERTY_SOURCES[name]} instead." if name in PROPERTY_SOURCES else " Override the property in a subclass."
        raise ArgumentError(f"{cls.__name__}.{name} follows from other arguments and cannot be set.{hint}")
    if name in fields or hasattr(cls, name) or any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__):
        return
    error = unknown_name_error(cls.__name__, name, fields, _NEAR)
    if error is not None:
        raise ArgumentError(f"{error} For an attribute of your own, declare it in a @dataclass subclass, or begin it with '_'.")
