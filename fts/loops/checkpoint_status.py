"""The status of a checkpoint: complete, corrupt, or something else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from fts.errors import CheckpointError
from fts.loops.checkpoints import PROGRESS_NAME, verify_checkpoint
from fts.state import STATE_NAME
from fts.storage import read_json
from fts.storage.manifest import FORMAT, MANIFEST, verify_files

CheckpointStatus: TypeAlias = Literal["complete", "model only", "corrupt", "unknown", "interrupted"]
"""The status of a checkpoint.

    complete     a run can resume from it
    model only   it is valid, but has no optimizer state: a run cannot resume from it (`save_only_model`)
    corrupt      files are missing, truncated or changed
    unknown      it cannot be verified: another program or a later version of fts wrote it, or it is not readable
    interrupted  a partial checkpoint of a run that died while it wrote or deleted it; its name is hidden
"""


def checkpoint_status(directory: Path) -> tuple[CheckpointStatus, str | None]:
    """The status of a checkpoint, by its checksums, and what is wrong with it; None if it is complete.

    >>> checkpoint_status(Path("nowhere"))
    ('corrupt', 'There is no checkpoint at nowhere.')
    """
    if unknown := _unknown(directory):
        return "unknown", unknown
    try:
        if is_model_only(directory):
            verify_files(directory)
            return "model only", f"{directory} has a model, but no training state (save_only_model): no run can resume from it."
        verify_checkpoint(directory)
    except CheckpointError as error:
        return "unknown" if isinstance(error.__cause__, PermissionError) else "corrupt", str(error)
    return "complete", None


def is_complete(directory: str | Path) -> bool:
    """Whether a run can resume from a checkpoint."""
    return checkpoint_status(Path(directory))[0] == "complete"


def is_model_only(directory: Path) -> bool:
    """Whether fts wrote a checkpoint without training state (`save_only_model`), so that no run can resume from it."""
    return (directory / MANIFEST).is_file() and not any((directory / name).exists() for name in (PROGRESS_NAME, STATE_NAME))


def looks_complete(directory: Path) -> bool:
    """Whether all files of the manifest exist with their sizes, or the status is unknown. It reads no tensors."""
    if _unknown(directory):
        return True
    try:
        files = read_json(directory, MANIFEST)["files"]
        return all((directory / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (CheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _unknown(directory: Path) -> str | None:
    """Why a checkpoint cannot be verified, if it cannot."""
    try:
        found = read_json(directory, MANIFEST).get("format")
    except CheckpointError as error:
        if isinstance(error.__cause__, PermissionError):
            return f"{directory} is not readable: {error.__cause__}"
        return _foreign(directory)
    if isinstance(found, int) and found > FORMAT:
        return f"{directory} has format {found}: a later version of fts wrote it; this one reads format {FORMAT}."
    return None


def _foreign(directory: Path) -> str | None:
    """A message if the files of a directory without a manifest show that another program wrote it."""
    try:
        names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    except PermissionError as error:
        return f"{directory} is not readable: {error}"
    if names and not names & {MANIFEST, PROGRESS_NAME, STATE_NAME}:
        return f"{directory} has no {MANIFEST} and no file that only fts writes: another program wrote it."
    return None
