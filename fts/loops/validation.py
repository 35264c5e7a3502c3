"""What a checkpoint is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from fts.errors import CheckpointError
from fts.loops.checkpoints import PROGRESS, verify_checkpoint
from fts.state import STATE
from fts.storage import read_document
from fts.storage.manifest import FORMAT, MANIFEST, verify_files

Condition: TypeAlias = Literal["whole", "model only", "damaged", "unknown", "cut off"]
"""What a checkpoint is good for.

    whole       a run can go on from it
    model only  it is intact, but has no state of an optimizer: a run cannot go on from it (`save_only_model`)
    damaged     files are missing, truncated or changed
    unknown     it cannot be judged: another program wrote it, or a later version of fts, or it may not be read
    cut off     what a run left that died while it wrote or deleted a checkpoint; its name is hidden
"""


def checkpoint_status(directory: Path) -> tuple[Condition, str | None]:
    """The condition of a checkpoint, by its checksums, and what is wrong with it; None if it is whole.

    >>> checkpoint_status(Path("nowhere"))
    ('damaged', 'There is no checkpoint at nowhere.')
    """
    if unknown := _unknown(directory):
        return "unknown", unknown
    try:
        if has_model_alone(directory):
            verify_files(directory)
            return "model only", f"{directory} has a model, but no state of a run (save_only_model): no run can go on from it."
        verify_checkpoint(directory)
    except CheckpointError as error:
        return "unknown" if isinstance(error.__cause__, PermissionError) else "damaged", str(error)
    return "whole", None


def is_whole(directory: str | Path) -> bool:
    """Whether a run can go on from a checkpoint."""
    return checkpoint_status(Path(directory))[0] == "whole"


def has_model_alone(directory: Path) -> bool:
    """Whether fts wrote a checkpoint without the state of a run (`save_only_model`), so that no run can go on from it."""
    return (directory / MANIFEST).is_file() and not any((directory / name).exists() for name in (PROGRESS, STATE))


def looks_whole(directory: Path) -> bool:
    """Whether the files that the manifest lists are there in their sizes, or nothing can be said. It reads no tensors."""
    if _unknown(directory):
        return True
    try:
        files = read_document(directory, MANIFEST)["files"]
        return all((directory / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (CheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _unknown(directory: Path) -> str | None:
    """Why a checkpoint cannot be judged, if it cannot."""
    try:
        found = read_document(directory, MANIFEST).get("format")
    except CheckpointError as error:
        if isinstance(error.__cause__, PermissionError):
            return f"{directory} may not be read: {error.__cause__}"
        return _foreign(directory)
    if isinstance(found, int) and found > FORMAT:
        return f"{directory} has format {found}: a later version of fts wrote it; this one reads format {FORMAT}."
    return None


def _foreign(directory: Path) -> str | None:
    """That another program wrote a directory without a manifest, if its files say so."""
    try:
        names = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    except PermissionError as error:
        return f"{directory} may not be read: {error}"
    if names and not names & {MANIFEST, PROGRESS, STATE}:
        return f"{directory} has no {MANIFEST} and no file that fts alone writes: another program wrote it."
    return None
