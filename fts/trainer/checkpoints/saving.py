"""Writing models and checkpoints."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fts import loops
from fts.distributed.deepspeed import in_buffers, whole_parameters
from fts.dtensors import any_sharded, full_tensor, is_sharded
from fts.errors import ArgumentError
from fts.loops import Position
from fts.loops.history import TRAINER_STATE
from fts.state import WEIGHTS, TrainState
from fts.trainer.arguments import TrainingArguments
from fts.trainer.arguments.choices import SaveStrategy
from fts.trainer.callbacks.state import TrainerState

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

    Where it is spread over processes (FSDP2, ZeRO's stage 3), all call this, and its tensors are gathered one after the other.

    Args:
        model: its `save_pretrained` is used where it has one.
        directory: is made if need be.
        processing_class: a tokenizer or processor to save beside it.
        args: are saved beside it as `training_args.json`.
        writes: whether this process writes; the others take part in the gathering.
    """
    spread = any_sharded(model.parameters()) or in_buffers(model)
    weights = _gathered(model, keep=writes) if spread else {}
    if not writes:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(directory, **({"state_dict": weights} if spread else {}))
    elif spread:
        from safetensors.torch import save_file

        first = {id(tensor): name for name, tensor in reversed(weights.items())}  # of tied tensors
        save_file({name: weights[name] for name in first.values()}, directory / WEIGHTS, metadata={"format": "pt"})
    else:
        from safetensors.torch import save_model as save_tensors  # knows tied tensors

        save_tensors(model, str(directory / WEIGHTS), metadata={"format": "pt"})
    _save_companions(directory, processing_class, args)


def _gathered(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The tensors of a model, whole and on the CPU; tied ones are the same. All processes call it, and keep them or not."""
    found: dict[int, Tensor] = {}
    names: dict[str, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            with whole_parameters([tensor]):
                gathered = full_tensor(tensor.detach()) if is_sharded(tensor) else tensor.detach().clone()  # not within a buffer
                found[id(tensor)] = gathered.cpu().contiguous() if keep else gathered.new_empty(0)
        names[name] = id(tensor)
    return {name: found[key] for name, key in names.items()}


def save_checkpoint(
    writer: loops.AsyncCheckpointer,
    root: str | Path,
    state: TrainState,
    position: Position,
    *,
    model: nn.Module,
    processing_class: Any,
    args: TrainingArguments,
    trainer_state: TrainerState,
    extra: Mapping[str, Any],
    only_model: bool | None = None,
    own_save: Callable[[str], Any] | None = None,
    then: Callable[[], object] | None = None,
) -> Path:
    """Begin to write `checkpoint-<step>`: the state that resumes the run, which is also a model for `from_pretrained`.

    Args:
        writer: writes it.
        root: the directory of the checkpoints.
        state: the core's state.
        position: where in the data to go on.
        model: what the weights belong to; its configuration is saved.
        processing_class: is saved, too, if it can be.
        args: are saved as `training_args.json`.
        trainer_state: is saved as `trainer_state.json`.
        extra: further JSON values that resuming needs.
        only_model: whether to leave out what resumes the run; by default as `save_only_model` says.
        own_save: the user's `save_model`, called with the directory in the place of the default; the state's files come after it.
        then: called when the checkpoint is durable.

    Returns:
        The directory, which is complete or not there at any instant. With `only_model` it has the model alone.
    """
    only_model = args.save_only_model if only_model is None else only_model

    def write(directory: Path) -> None:  # in each process
        if own_save is not None:
            own_save(str(directory))
        elif only_model:
            save_model(model, directory, processing_class, args, writes=writer.writes)
        else:
            _save_configuration(model, directory, writes=writer.writes)
            if writer.writes:
                _save_companions(directory, processing_class, args)
        if writer.writes:
            trainer_state.save_to_json(directory / TRAINER_STATE)

    path = Path(root) / f"checkpoint-{trainer_state.global_step}"
    if only_model:
        return writer.write(path, write, then)
    return writer.save(path, state, position, extra=extra, write=write, then=then, frozen=not _has_adapters(model))


def saves(args: TrainingArguments) -> bool:
    """Whether a run writes checkpoints.

    >>> saves(TrainingArguments(save_strategy="no"))
    False
    """
    return args.save_strategy != SaveStrategy.NO or args.save_every is not None


def check_output_dir(args: TrainingArguments) -> None:
    """Make the directory of a run that saves, and find out now rather than at the first save whether it can be written to.

    Raises:
        ArgumentError: it is a file, or cannot be written to.
    """
    if not saves(args) or not args.should_save:
        return
    directory = str(args.output_dir)
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ArgumentError(
            f"output_dir={directory!r} cannot be written to: {error}. Choose another one, or save_strategy='no'."
        ) from error


def _has_adapters(model: Any) -> bool:
    """Whether it is a model of peft's: the parameters below its adapters are frozen, and come with the model."""
    return callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config")


def _save_configuration(model: Any, directory: Path, *, writes: bool) -> None:
    if _has_adapters(model):
        save_model(model, directory, writes=writes)  # the adapters, beside the whole state
    if _has_adapters(model) or not writes:
        return
    for name in ("config", "generation_config"):
        part: Any = getattr(model, name, None)
        if callable(getattr(part, "save_pretrained", None)):
            if name == "config" and not getattr(part, "architectures", None):
                part.architectures = [type(model).__name__]
            part.save_pretrained(directory)


def _save_companions(directory: Path, processing_class: Any, args: TrainingArguments | None) -> None:
    if callable(getattr(processing_class, "save_pretrained", None)):
        processing_class.save_pretrained(directory)
    if args is not None:
        (directory / ARGUMENTS_FILE).write_text(json.dumps(args.to_dict(), indent=2, sort_keys=True, default=str) + "\n")
