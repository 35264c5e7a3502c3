"""Checkpoints that transformers' Trainer wrote: which directories are some."""

from __future__ import annotations

from pathlib import Path

from fts.loops.history import TRAINER_STATE
from fts.state import WEIGHTS
from fts.storage import has_tensors
from fts.storage.manifest import MANIFEST
from fts.trainer.weights import ADAPTERS

TORCH_OPTIMIZER = "optimizer.pt"
TORCH_SCHEDULER = "scheduler.pt"
TORCH_ARGUMENTS = "training_args.bin"

FILES = (TORCH_OPTIMIZER, TORCH_SCHEDULER, TORCH_ARGUMENTS)
"""Files that transformers' Trainer writes, and fts never."""


def is_transformers_checkpoint(directory: str | Path) -> bool:
    """Whether transformers' Trainer wrote a checkpoint, as its files tell.

    >>> is_transformers_checkpoint("nowhere")
    False
    """
    directory = Path(directory)
    written = any((directory / name).is_file() for name in FILES)
    return written and (directory / TRAINER_STATE).is_file() and not (directory / MANIFEST).is_file()


def can_be_resumed(directory: Path) -> bool:
    """Whether transformers' Trainer wrote a checkpoint, with all that a run needs to go on. Its files have no checksums."""
    has_weights = has_tensors(directory, WEIGHTS) or has_tensors(directory, ADAPTERS)
    return is_transformers_checkpoint(directory) and (directory / TORCH_OPTIMIZER).is_file() and has_weights
