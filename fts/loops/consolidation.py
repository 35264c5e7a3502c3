"""The model of a sharded checkpoint, written as full tensors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from fts.errors import CheckpointError
from fts.loops.checkpoints import PROGRESS_NAME
from fts.state import OPTIMIZER_NAME, STATE_NAME, WEIGHTS_NAME
from fts.storage import (
    MAX_SHARD_SIZE,
    FileChecksum,
    has_sharded_tensors,
    mmap_file,
    read_into,
    read_tensor_specs,
    split_into_shards,
    write_text_files,
)
from fts.storage.atomic import atomic_directory
from fts.storage.manifest import MANIFEST, verify_files

NOT_MODEL_FILES = (PROGRESS_NAME, STATE_NAME, MANIFEST, "trainer_state.json")
"""Files of a run, not of its model."""


def consolidate_checkpoint(checkpoint: str | Path, directory: str | Path, *, shard_size: int = MAX_SHARD_SIZE) -> Path:
    """Write the model of a sharded checkpoint so that `from_pretrained` reads it.

    It needs no process group and little memory: tensors are read directly into the new files, which are memory-mapped.

    Args:
        checkpoint: a sharded checkpoint; every file is verified.
        directory: of the model, with its configuration and tokenizer; it is written atomically.
        shard_size: at most so many bytes of tensors in a file.

    Returns:
        The directory.

    Raises:
        CheckpointError: the checkpoint is corrupt, or has no sharded weights; or the model cannot be written.
    """
    checkpoint, directory = Path(checkpoint), Path(directory)
    verify_files(checkpoint)
    if not has_sharded_tensors(checkpoint, WEIGHTS_NAME):
        raise CheckpointError(f"{checkpoint} has no sharded weights. If it has a model.safetensors, from_pretrained reads that.")

    def fill(hidden: Path) -> Mapping[str, FileChecksum] | None:
        for path in sorted(checkpoint.iterdir()):
            if path.is_file() and path.name not in NOT_MODEL_FILES and not path.name.startswith((WEIGHTS_NAME, OPTIMIZER_NAME)):
                shutil.copyfile(path, hidden / path.name)
        forms = {
            name: torch.empty_like(form, device="meta") for name, form in read_tensor_specs(checkpoint, WEIGHTS_NAME).items()
        }
        contents = split_into_shards(WEIGHTS_NAME, forms, shard_size)
        write_text_files(hidden, contents)
        for file in contents.files:
            read_into(checkpoint, WEIGHTS_NAME, mmap_file(hidden, file))
        return None

    return atomic_directory(directory, fill)
