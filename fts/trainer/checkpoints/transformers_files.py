"""The files of checkpoints that transformers' Trainer wrote."""

from __future__ import annotations

import logging
from pathlib import Path
from zipfile import is_zipfile

from fts.errors import CheckpointError
from fts.loops.trainer_state import TRAINER_STATE_NAME
from fts.state import WEIGHTS_NAME
from fts.storage import has_tensors, read_tensors
from fts.storage.manifest import MANIFEST
from fts.trainer.callbacks import TrainerState
from fts.trainer.model import ADAPTER_SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

TORCH_OPTIMIZER = "optimizer.pt"
TORCH_SCHEDULER = "scheduler.pt"
TORCH_SCALER = "scaler.pt"
TORCH_ARGUMENTS = "training_args.bin"

TRANSFORMERS_FILES = (TORCH_OPTIMIZER, TORCH_SCHEDULER, TORCH_ARGUMENTS)
"""Files that transformers' Trainer writes, and fts does not."""


def is_transformers_checkpoint(directory: str | Path) -> bool:
    """Whether transformers' Trainer wrote a checkpoint, judged by its files.

    >>> is_transformers_checkpoint("nowhere")
    False
    """
    directory = Path(directory)
    written = any((directory / name).is_file() for name in TRANSFORMERS_FILES)
    return written and (directory / TRAINER_STATE_NAME).is_file() and not (directory / MANIFEST).is_file()


def is_resumable(directory: Path) -> bool:
    """Whether transformers' Trainer wrote a checkpoint that has all that a run needs to resume, and is not truncated.

    Its files have no checksums, so other corruption is not found. A warning says why a run cannot resume from it.
    """
    if not is_transformers_checkpoint(directory) or not (directory / TORCH_OPTIMIZER).is_file():
        return False
    name = next((name for name in (WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME) if has_tensors(directory, name)), None)
    if name is None:
        return False
    try:
        read_tensors(directory, name)  # memory-mapped; their headers are compared with the files' sizes
        TrainerState.load_from_json(directory / TRAINER_STATE_NAME)
        _check_archives(directory)
    except CheckpointError as error:
        logger.warning("A run cannot resume from %s: %s", directory, error)
        return False
    return True


def _check_archives(directory: Path) -> None:
    """A file of torch.save is a zip archive, which has its table of contents at the end."""
    for name in (TORCH_OPTIMIZER, TORCH_SCHEDULER):
        path = directory / name
        if path.is_file() and not is_zipfile(path):
            raise CheckpointError(f"{path} is truncated, or torch.save did not write it.")
