"""Checkpoints that transformers' Trainer wrote: which directories are some."""

from __future__ import annotations

from pathlib import Path

from fts.loops.finding import checkpoints_in
from fts.loops.manifest import MANIFEST
from fts.state import WEIGHTS
from fts.trainer.state import STATE_FILE

TORCH_OPTIMIZER = "optimizer.pt"
TORCH_SCHEDULER = "scheduler.pt"
TORCH_ARGUMENTS = "training_args.bin"

ADAPTERS = "adapter_model.safetensors"
"""Where peft saves adapters alone."""

FILES = (TORCH_OPTIMIZER, TORCH_SCHEDULER, TORCH_ARGUMENTS)
"""Files that transformers' Trainer writes, and fts never."""


def is_transformers_checkpoint(directory: str | Path) -> bool:
    """Whether transformers' Trainer wrote a checkpoint, as its files tell.

    >>> is_transformers_checkpoint("nowhere")
    False
    """
    directory = Path(directory)
    written = any((directory / name).is_file() for name in FILES)
    return written and (directory / STATE_FILE).is_file() and not (directory / MANIFEST).is_file()


def has_weights(directory: Path) -> bool:
    """Whether there are weights in safetensors, of a whole model or of adapters."""
    return any((directory / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json", ADAPTERS))


def newest_transformers_checkpoint(root: str | Path) -> Path | None:
    """The one of the highest step that a run can go on from; None if there is none. Its files have no checksums."""
    found = reversed(checkpoints_in(root).values())
    return next(
        (path for path in found if is_transformers_checkpoint(path) and (path / TORCH_OPTIMIZER).is_file() and has_weights(path)),
        None,
    )
