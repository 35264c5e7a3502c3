"""The files of a checkpoint, and the directory that checkpoints are written to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from fts import loops
from fts.errors import ArgumentError
from fts.loops import Position
from fts.loops.trainer_state import TRAINER_STATE_NAME
from fts.state import TrainState
from fts.trainer.arguments import SaveStrategy, TrainingArguments
from fts.trainer.callbacks import TrainerState
from fts.trainer.checkpoints.model_files import has_adapters, save_config, save_model, save_processing_class_and_args


@attrs.frozen(eq=False)
class CheckpointContents:
    """What is written to a checkpoint.

    Attributes:
        state: the weights, the optimizer's state and the step.
        position: where in the data the run resumes.
        trainer_state: is saved as `trainer_state.json`.
        model: what the weights belong to; its configuration is saved.
        args: are saved as `training_args.json`.
        processing_class: is saved, too, if it can be.
        extra: further JSON values that resuming needs.
        only_model: whether to leave out what resumes the run.
        save_model: the user's `save_model`, called with the directory instead of the default; the state's files come after it.
    """

    state: TrainState
    position: Position
    trainer_state: TrainerState
    model: nn.Module
    args: TrainingArguments
    processing_class: Any = None
    extra: Mapping[str, Any] = attrs.Factory(dict)
    only_model: bool = False
    save_model: Callable[[str], Any] | None = None


def save_checkpoint(
    writer: loops.AsyncCheckpointer,
    root: str | Path,
    contents: CheckpointContents,
    on_complete: Callable[[], object] | None = None,
) -> Path:
    """Begin to write `checkpoint-<step>`: the state that resumes the run, which is also a model for `from_pretrained`.

    Args:
        writer: writes it.
        root: the directory of the checkpoints.
        contents: what to write.
        on_complete: called when the checkpoint is durable.

    Returns:
        The directory, which appears atomically. With `only_model` it has the model alone.
    """
    args, model, trainer_state = contents.args, contents.model, contents.trainer_state

    def write(directory: Path) -> None:  # on each rank
        if contents.save_model is not None:
            contents.save_model(str(directory))
        elif contents.only_model:
            save_model(model, directory, contents.processing_class, args, writes=writer.is_writer)
        else:
            save_config(model, directory, writes=writer.is_writer)
            if writer.is_writer:
                save_processing_class_and_args(directory, contents.processing_class, args)
        if writer.is_writer:
            trainer_state.save_to_json(directory / TRAINER_STATE_NAME)

    path = Path(root) / f"checkpoint-{trainer_state.global_step}"
    if contents.only_model:
        return writer.write_directory(path, write, on_complete)
    return writer.save(
        path,
        contents.state,
        contents.position,
        extra=contents.extra,
        write=write,
        on_complete=on_complete,
        frozen=not has_adapters(model),
    )


def saves_checkpoints(args: TrainingArguments) -> bool:
    """Whether a run writes checkpoints.

    >>> saves_checkpoints(TrainingArguments(save_strategy="no"))
    False
    """
    return args.save_strategy != SaveStrategy.NO or args.save_every is not None


def check_output_dir(args: TrainingArguments) -> None:
    """Make the directory of a run that saves, and check before training that it can be written to.

    Raises:
        ArgumentError: it is a file, or cannot be written to.
    """
    if not saves_checkpoints(args) or not args.should_save:
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
