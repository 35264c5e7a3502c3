"""Directories that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fts.errors import CheckpointError
from fts.loops.manifest import flush, seal


def write_whole(directory: str | Path, fill: Callable[[Path], None]) -> Path:
    """Write a directory that is, at any instant, either complete or not there, as `save_checkpoint` does.

    Args:
        directory: where it shall be; an earlier one of that name is replaced.
        fill: called with the hidden directory, to write the files.

    Returns:
        The directory.

    Raises:
        CheckpointError: the disk is full or not writable. What was there before stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     path = write_whole(f"{root}/notes", lambda hidden: hidden.joinpath("a.txt").write_text("a") and None)
    ...     sorted(file.name for file in path.iterdir())
    ['a.txt', 'manifest.json']
    """
    from safetensors import SafetensorError  # what safetensors makes of an OSError

    directory = Path(directory)
    try:
        _write_whole(directory, fill)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}. Earlier checkpoints are whole. Make room or choose another directory, "
            "then resume from the newest one."
        ) from error
    return directory


def _write_whole(directory: Path, fill: Callable[[Path], None]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    undo_interrupted(directory)
    hidden = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(hidden, ignore_errors=True)  # left by a run that died here
    hidden.mkdir()
    try:
        fill(hidden)
        seal(hidden)
        _replace(directory, hidden)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        undo_interrupted(directory)
        raise


def _replace(directory: Path, sealed: Path) -> None:
    aside = _aside(directory)
    for attempt in range(3):
        if directory.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(directory, aside)
        try:
            os.rename(sealed, directory)
            break
        except OSError as error:
            # a reader took the gap for an interrupted replacement and moved the old one back
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 2:
                raise
    flush(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def undo_interrupted(directory: Path) -> None:
    """Finish what a run that died inside `_replace` left: move an old checkpoint back, or delete it if it was replaced."""
    aside = _aside(directory)
    if not aside.exists():
        return
    if directory.exists():
        shutil.rmtree(aside, ignore_errors=True)
        return
    try:
        os.rename(aside, directory)
    except FileNotFoundError:  # another process was faster
        return


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")
