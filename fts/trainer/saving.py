"""Models and checkpoints on the disk."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fts import loops
from fts.errors import ArgumentError, CheckpointError
from fts.loops import Position
from fts.loops.history import TRAINER_STATE
from fts.state import OPTIMIZER, TRAINED, WEIGHTS, TrainState
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import export_callbacks, restore_callbacks
from fts.trainer.choices import SaveStrategy
from fts.trainer.foreign import ADAPTERS, can_be_resumed, is_transformers_checkpoint
from fts.trainer.state import TrainerState

ARGUMENTS_FILE = "training_args.json"


def save_model(
    model: nn.Module, directory: str | Path, processing_class: Any = None, args: TrainingArguments | None = None
) -> None:
    """Write a model so that `from_pretrained` reads it, or for other modules its `model.safetensors`.

    Args:
        model: its `save_pretrained` is used where it has one.
        directory: is made if need be.
        processing_class: a tokenizer or processor to save beside it.
        args: are saved beside it as `training_args.json`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_pretrained: Any = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(directory)
    else:
        from safetensors.torch import save_model as save_tensors  # knows tied tensors

        save_tensors(model, str(directory / WEIGHTS), metadata={"format": "pt"})
    _save_companions(directory, processing_class, args)


def save_checkpoint(
    writer: loops.Writer,
    root: str | Path,
    state: TrainState,
    position: Position,
    *,
    model: nn.Module,
    processing_class: Any,
    args: TrainingArguments,
    trainer_state: TrainerState,
    extra: Mapping[str, Any],
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
        own_save: the user's `save_model`, called with the directory in the place of the default; the state's files come after it.
        then: called when the checkpoint is durable.

    Returns:
        The directory, which is complete or not there at any instant. With `save_only_model` it has the model alone.
    """

    def write(directory: Path) -> None:
        if own_save is not None:
            own_save(str(directory))
        else:
            _save_configuration(model, directory)
            _save_companions(directory, processing_class, args)
        trainer_state.save_to_json(directory / TRAINER_STATE)

    def write_model(directory: Path) -> None:
        if own_save is not None:
            own_save(str(directory))
        else:
            save_model(model, directory, processing_class, args)
        trainer_state.save_to_json(directory / TRAINER_STATE)

    path = Path(root) / f"checkpoint-{trainer_state.global_step}"
    if args.save_only_model:
        return writer.write(path, write_model, then)
    return writer.save(path, state, position, extra=extra, write=write, then=then, frozen=not _has_adapters(model))


def check_output_dir(args: TrainingArguments) -> None:
    """Make the directory of a run that saves, and find out now rather than at the first save whether it can be written to.

    Raises:
        ArgumentError: it is a file, or cannot be written to.
    """
    if args.save_strategy == SaveStrategy.NO and args.save_every is None:
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


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Read a checkpoint's weights and buffers into a model, in place.

    Raises:
        ArgumentError: names or shapes are not those of the model.
    """
    adapters = Path(directory) / ADAPTERS
    if adapters.is_file() and not (Path(directory) / WEIGHTS).is_file():
        _load_adapters(model, adapters)
        return
    found = read_weights(Path(directory))
    targets = _tensors(model)
    missing = [name for name, _ in model.named_parameters() if name not in found]
    unknown = [name for name in found if name not in targets or targets[name].shape != found[name].shape]
    if missing or unknown:
        raise ArgumentError(
            f"{directory} does not fit the model {type(model).__name__}: missing {missing[:3]}, unexpected {unknown[:3]}."
        )
    with torch.no_grad():
        for name, tensor in found.items():
            targets[name].copy_(tensor)


def _load_adapters(model: nn.Module, path: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(path))


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, of one file or of shards.

    Raises:
        CheckpointError: there are none, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = directory / f"{WEIGHTS}.index.json"
    try:
        if (directory / WEIGHTS).is_file():
            return dict(load_file(directory / WEIGHTS))
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
            return {name: tensor for file in sorted(files) for name, tensor in load_file(directory / Path(file).name).items()}
    except (OSError, SafetensorError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The weights in {directory} cannot be read: {error}") from error
    raise CheckpointError(f"{directory} has no weights: neither {WEIGHTS} nor {index.name} is there.")


def restorer(model: nn.Module, callbacks: list[Any], optimizers: Sequence[Any] = ()) -> Callable[[], None]:
    """A function that brings a model's weights and the callbacks' states back to what they are now.

    Args:
        model: a copy of its tensors is kept on the CPU.
        callbacks: those that have a state.
        optimizers: the user's torch optimizer and schedule, or None in their places.
    """
    torch_states = [None if part is None else copy.deepcopy(part.state_dict()) for part in optimizers]
    kept = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(model).items()}
    states = copy.deepcopy(export_callbacks(callbacks))

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in _tensors(model).items():
                tensor.copy_(kept[name])
        restore_callbacks(callbacks, states)
        for part, state in zip(optimizers, torch_states, strict=True):
            if part is not None:
                part.load_state_dict(copy.deepcopy(state))

    return restore


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def find_checkpoint(resume: bool | str | Path | None, root: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means.

    Args:
        resume: True for the newest whole one in `root`, a path, or None or False for none; transformers' Trainer may have
            written it, too.
        root: the directory of the checkpoints.

    Raises:
        ArgumentError: there is none.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        newest = loops.newest_checkpoint(root, also=can_be_resumed)  # also of transformers' Trainer
        if newest is None:
            raise ArgumentError(
                f"No valid checkpoint found in output directory ({root}), but resume_from_checkpoint=True. Train without it "
                "first, or give the path of a checkpoint."
            )
        return newest
    path = Path(resume)
    if is_transformers_checkpoint(path):
        return path
    found = [
        name for name in (WEIGHTS, TRAINED, OPTIMIZER) if any((path / file).is_file() for file in (name, f"{name}.index.json"))
    ]
    if WEIGHTS not in found and TRAINED not in found:
        there = "the directory does not exist" if not path.is_dir() else f"it has no {WEIGHTS}"
        raise ArgumentError(
            f"Can't find a valid checkpoint at {path}: {there}. Use resume_from_checkpoint=True for the newest one."
        )
    if OPTIMIZER not in found:
        raise ArgumentError(
            f"{path} has a model, but no {OPTIMIZER}: it was saved with save_only_model=True, or not by fts, and a run cannot go "
            "on from it. Begin a new run with its model: from_pretrained(path)."
        )
    return path


def _has_adapters(model: Any) -> bool:
    """Whether it is a model of peft's: the parameters below its adapters are frozen, and come with the model."""
    return callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config")


def _save_configuration(model: Any, directory: Path) -> None:
    if _has_adapters(model):
        model.save_pretrained(directory)  # the adapters, beside the whole state
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
