"""Atomic directories: complete or absent, also after a crash while they are written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fts.errors import CheckpointError
from fts.storage.files import FileChecksum, fsync
from fts.storage.manifest import write_manifest


def atomic_directory(directory: str | Path, fill: Callable[[Path], Mapping[str, FileChecksum] | None]) -> Path:
    """Write a directory that is, at any instant, either complete or absent.

    Args:
        directory: the path; an earlier directory is replaced.
        fill: writes the files to a temporary directory. It may return the checksums of files that it wrote; the others are read
            for theirs.

    Returns:
        The directory.

    Raises:
        CheckpointError: the disk is full or not writable. An earlier directory stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     path = atomic_directory(f"{root}/notes", lambda temporary: temporary.joinpath("a.txt").write_text("a") and None)
    ...     sorted(file.name for file in path.iterdir())
    ['a.txt', 'manifest.json']
    """
    directory = Path(directory)
    with temporary_directory(directory) as temporary:
        commit(directory, temporary, fill(temporary))
    return directory


@contextmanager
def temporary_directory(directory: Path) -> Iterator[Path]:
    """A new hidden directory next to `directory`, for `commit`; it is removed if the block fails.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    with translate_disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        recover_interrupted(directory)
        _delete_leftovers(directory)
        temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.writing")
        temporary.mkdir()
    with remove_on_error(directory, temporary):
        yield temporary


@contextmanager
def remove_on_error(directory: Path, temporary: Path) -> Iterator[None]:
    """A block that writes to a temporary directory, which is removed if the block fails; it raises as `temporary_directory`."""
    try:
        with translate_disk_errors(directory):
            yield
    except BaseException as error:
        if isinstance(error.__cause__, FileNotFoundError) and not temporary.exists():
            raise CheckpointError(
                f"{directory} could not be written: another run began to write the same checkpoint. Give each run a directory of "
                "its own."
            ) from error
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # on a disk that is not writable, the next load does it
            recover_interrupted(directory)
        raise


@contextmanager
def translate_disk_errors(directory: Path) -> Iterator[None]:
    """A block in which errors of the disk become a `CheckpointError`."""
    from safetensors import SafetensorError  # safetensors raises it for an OSError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}. Earlier checkpoints are complete. Free disk space or choose another "
            "directory, then resume from the newest one."
        ) from error


def commit(directory: Path, temporary: Path, checksums: Mapping[str, FileChecksum] | None = None) -> None:
    """Write the manifest of a temporary directory, and move it to its final path.

    Args:
        directory: the final path.
        temporary: of `temporary_directory`.
        checksums: see `write_manifest`.
    """
    write_manifest(temporary, checksums)
    _replace(directory, temporary)


def _replace(directory: Path, temporary: Path) -> None:
    backup = _backup_path(directory)
    for attempt in range(3):
        if os.path.lexists(directory):
            _remove(backup)
            with suppress(FileNotFoundError):  # another writer was faster
                os.rename(directory, backup)
        try:
            os.rename(temporary, directory)
            break
        except OSError as error:
            # a reader saw an interrupted replacement and moved the old directory back, or another writer was faster
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 2:
                raise
    fsync(directory.parent)
    _remove(backup)


def recover_interrupted(directory: Path) -> None:
    """Recover from a run that died inside `_replace`: move the old directory back, or delete it if it was replaced."""
    backup = _backup_path(directory)
    if not os.path.lexists(backup):
        return
    if os.path.lexists(directory):
        _remove(backup)
        return
    try:
        os.rename(backup, directory)
    except FileNotFoundError:  # another process was faster
        return


def _delete_leftovers(directory: Path) -> None:
    """Delete temporary directories of runs that died. A run that is still writing to one fails at its next file."""
    leftover = re.compile(rf"\.{re.escape(directory.name)}(\.[0-9a-f]+)?\.writing")
    for path in directory.parent.iterdir():
        if leftover.fullmatch(path.name):
            with suppress(OSError):
                delete_atomically(path)


def delete_atomically(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that an interrupted deletion does not leave a partial checkpoint.

    Args:
        path: a checkpoint, or the leftovers of one.

    Raises:
        OSError: it could not be renamed, or not be deleted completely; the rest has a hidden name.
    """
    if not path.name.endswith(".deleting"):
        hidden = path.with_name(f".{path.name.removeprefix('.').removesuffix('.writing')}.deleting")
        if os.path.lexists(hidden):
            delete_atomically(hidden)
        os.rename(path, hidden)
        path = hidden
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Delete a directory, a file, or a link without its target, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _backup_path(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")
