"""The files of a model: weights, configuration, processing class and arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fts.distributed.deepspeed import gathered_parameters, has_flat_buffers
from fts.dtensors import any_dtensor, full_tensor, is_dtensor
from fts.state import WEIGHTS_NAME
from fts.trainer.arguments import TrainingArguments

ARGUMENTS_FILE = "training_args.json"


def save_model(
    model: nn.Module,
    directory: str | Path,
    processing_class: Any = None,
    args: TrainingArguments | None = None,
    *,
    writes: bool = True,
) -> None:
    """Write a model so that `from_pretrained` reads it, or for other modules its `model.safetensors`.

    Where it is sharded (FSDP2, ZeRO's stage 3), all ranks call this, and its tensors are gathered one after the other.

    Args:
        model: its `save_pretrained` is used where it has one.
        directory: is made if it does not exist.
        processing_class: a tokenizer or processor to save with it.
        args: are saved with it as `training_args.json`.
        writes: whether this rank writes; the others take part in the gathering.
    """
    sharded = any_dtensor(model.parameters()) or has_flat_buffers(model)
    weights = _gather_state_dict(model, keep=writes) if sharded else {}
    if not writes:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(directory, **({"state_dict": weights} if sharded else {}))
    elif sharded:
        from safetensors.torch import save_file

        first = {id(tensor): name for name, tensor in reversed(weights.items())}  # the first name of tied tensors
        save_file({name: weights[name] for name in first.values()}, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    else:
        from safetensors.torch import save_model as save_tensors  # handles tied tensors

        save_tensors(model, str(directory / WEIGHTS_NAME), metadata={"format": "pt"})
    save_processing_class_and_args(directory, processing_class, args)


def _gather_state_dict(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The full tensors of a model on the CPU; tied ones are the same object. All ranks call it, and keep them or not."""
    found: dict[int, Tensor] = {}
    names: dict[str, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            with gathered_parameters([tensor]):
                gathered = (
                    full_tensor(tensor.detach()) if is_dtensor(tensor) else tensor.detach().clone()
                )  # not a view of a flat buffer
                found[id(tensor)] = gathered.cpu().contiguous() if keep else gathered.new_empty(0)
        names[name] = id(tensor)
    return {name: found[key] for name, key in names.items()}


def has_adapters(model: Any) -> bool:
    """Whether it is a peft model: the weights below its adapters are frozen, and come with the base model."""
    return callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config")


def save_config(model: Any, directory: Path, *, writes: bool) -> None:
    """Write the configuration of a model, or its adapters where it has some; all ranks call it."""
    if has_adapters(model):
        save_model(model, directory, writes=writes)  # the adapters, in addition to the full state
    if has_adapters(model) or not writes:
        return
    for name in ("config", "generation_config"):
        part: Any = getattr(model, name, None)
        if callable(getattr(part, "save_pretrained", None)):
            if name == "config" and not getattr(part, "architectures", None):
                part.architectures = [type(model).__name__]
            part.save_pretrained(directory)


def save_processing_class_and_args(directory: Path, processing_class: Any, args: TrainingArguments | None) -> None:
    """Write a processing class, if it can be saved, and `training_args.json`."""
    if callable(getattr(processing_class, "save_pretrained", None)):
        processing_class.save_pretrained(directory)
    if args is not None:
        (directory / ARGUMENTS_FILE).write_text(json.dumps(args.to_dict(), indent=2, sort_keys=True, default=str) + "\n")
