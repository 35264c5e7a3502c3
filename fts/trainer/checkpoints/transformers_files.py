"""Checkpoints that transformers' Trainer wrote: which directories are some."""

from __future__ import annotations

import logging
from pathlib import Path
from zipfile import is_zipfile

from fts.errors import CheckpointError
from fts.loops.trainer_state import TRAINER_STATE_NAME
from fts.state import WEIGHTS_NAME
from fts.storage import has_tensors, read_tensors
from fts.storage.manifest import MANIFEST
from fts.trainer.callbacks.state import TrainerState
from fts.trainer.model import ADAPTERS

logger = logging.getLogger(__name__)

TORCH_OPTIMIZER = "optimizer.pt"
TORCH_SCHEDULER = "scheduler.pt"
TORCH_SCALER = "scaler.pt"
TORCH_ARGUMENTS = "training_args.bin"

TRANSFORMERS_FILES = (TORCH_OPTIMIZER, TORCH_SCHEDULER, TORCH_ARGUMENTS)
"""Files that transformers' Trainer writes, and fts never."""


def is_transformers_checkpoint(directory: str | Path) -> bool:
    """Whether transformers' Trainer wrote a checkpoint, as its files tell.

    >>> is_transformers_checkpoint("nowhere")
    False
    """
    directory = Path(directory)
    written = any((directory / name).is_file() for name in TRANSFORMERS_FILES)
    return written and (directory / TRAINER_STATE_NAME).is_file() and not (directory / MANIFEST).is_file()


def is_resumable(directory: Path) -> bool:
    """Whether transformers' Trainer wrote a checkpoint, with all that a run needs to go on, and none of it cut off.

    Its files have no checksums, so that other damage is not found; a warning says what is.
    """
    if not is_transformers_checkpoint(directory) or not (directory / TORCH_OPTIMIZER).is_file():
        return False
    name = next((name for name in (WEIGHTS_NAME, ADAPTERS) if has_tensors(directory, name)), None)
    if name is None:
        return False
    try:
        read_tensors(directory, name)  # which maps them: their headers and the files' sizes are compared
        TrainerState.load_from_json(directory / TRAINER_STATE_NAME)
        _check_archives(directory)
    except CheckpointError as error:
        logger.warning("A run cannot go on from %s: %s", directory, error)
        return False
    return True


def _check_archives(directory: Path) -> None:
    """What torch saves is a zip archive, whose end has its table of contents."""
    for name in (TORCH_OPTIMIZER, TORCH_SCHEDULER):
        path = directory / name
        if path.is_file() and not is_zipfile(path):
            raise CheckpointError(f"{path} is cut off, or torch.save did not write it.")
