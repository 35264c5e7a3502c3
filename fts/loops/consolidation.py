"""A checkpoint that several processes wrote in parts, as a model in one piece."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from fts.errors import CheckpointError
from fts.loops.checkpoints import PROGRESS
from fts.state import OPTIMIZER, STATE, WEIGHTS
from fts.storage import SHARD_SIZE, Written, forms_of, is_spread, lay_out, map_file, read_into, write_texts
from fts.storage.atomic import atomic_directory
from fts.storage.manifest import MANIFEST, verify_files

LEFT = (PROGRESS, STATE, MANIFEST, "trainer_state.json")
"""What says something of a run, and not of its model."""


def consolidate_checkpoint(checkpoint: str | Path, directory: str | Path, *, shard_size: int = SHARD_SIZE) -> Path:
    """Write the model of a sharded checkpoint so that `from_pretrained` reads it.

    It needs no process group and little memory: tensors are read straight into the new files, which are mapped.

    Args:
        checkpoint: where processes wrote their parts; every file is verified.
        directory: where the model shall be, beside its configuration and tokenizer; it is complete or not there.
        shard_size: bytes of tensors that a file may have.

    Returns:
        The directory.

    Raises:
        CheckpointError: the checkpoint is damaged, or has no weights in parts; or the model cannot be written.
    """
    checkpoint, directory = Path(checkpoint), Path(directory)
    verify_files(checkpoint)
    if not is_spread(checkpoint, WEIGHTS):
        raise CheckpointError(f"{checkpoint} has no weights in parts. If it has a model.safetensors, from_pretrained reads that.")

    def fill(hidden: Path) -> Mapping[str, Written] | None:
        for path in sorted(checkpoint.iterdir()):
            if path.is_file() and path.name not in LEFT and not path.name.startswith((WEIGHTS, OPTIMIZER)):
                shutil.copyfile(path, hidden / path.name)
        forms = {name: torch.empty_like(form, device="meta") for name, form in forms_of(checkpoint, WEIGHTS).items()}
        contents = lay_out(WEIGHTS, forms, shard_size)
        write_texts(hidden, contents)
        for file in contents.files:
            read_into(checkpoint, WEIGHTS, map_file(hidden, file))
        return None

    return atomic_directory(directory, fill)
