"""Directories that are whole or absent, whatever happens while they are written."""

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
    """Write a directory that is, at any instant, either complete or not there.

    Args:
        directory: where it shall be; an earlier one of that name is replaced.
        fill: called with the hidden directory, to write the files. It may return what it knows of files that it wrote; the
            others are read for their checksums.

    Returns:
        The directory.

    Raises:
        CheckpointError: the disk is full or not writable. What was there before stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     path = atomic_directory(f"{root}/notes", lambda hidden: hidden.joinpath("a.txt").write_text("a") and None)
    ...     sorted(file.name for file in path.iterdir())
    ['a.txt', 'manifest.json']
    """
    directory = Path(directory)
    with temporary_directory(directory) as hidden:
        commit(directory, hidden, fill(hidden))
    return directory


@contextmanager
def temporary_directory(directory: Path) -> Iterator[Path]:
    """A new hidden directory beside `directory`, to be filled for `commit`; it goes if the block fails.

    Raises:
        CheckpointError: in the place of what the system says of a disk that is full or not writable.
    """
    with translate_disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        recover_interrupted(directory)
        _delete_leftovers(directory)
        hidden = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.writing")
        hidden.mkdir()
    with remove_on_error(directory, hidden):
        yield hidden


@contextmanager
def remove_on_error(directory: Path, hidden: Path) -> Iterator[None]:
    """A block that writes to a hidden directory, which goes if the block fails; errors are as those of `temporary_directory`."""
    try:
        with translate_disk_errors(directory):
            yield
    except BaseException as error:
        if isinstance(error.__cause__, FileNotFoundError) and not hidden.exists():
            raise CheckpointError(
                f"{directory} could not be written: another run began to write the same checkpoint. Give each run a directory of "
                "its own."
            ) from error
        shutil.rmtree(hidden, ignore_errors=True)
        with suppress(OSError):  # where nothing can be written, the next load does it
            recover_interrupted(directory)
        raise


@contextmanager
def translate_disk_errors(directory: Path) -> Iterator[None]:
    """A block in which what the system says of a disk becomes a `CheckpointError`."""
    from safetensors import SafetensorError  # what safetensors makes of an OSError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}. Earlier checkpoints are whole. Make room or choose another directory, "
            "then resume from the newest one."
        ) from error


def commit(directory: Path, hidden: Path, written: Mapping[str, FileChecksum] | None = None) -> None:
    """Seal a hidden directory and put it into its place.

    Args:
        directory: the place.
        hidden: of `temporary_directory`.
        written: see `write_manifest`.
    """
    write_manifest(hidden, written)
    _replace(directory, hidden)


def _replace(directory: Path, sealed: Path) -> None:
    aside = _backup_path(directory)
    for attempt in range(3):
        if os.path.lexists(directory):
            _discard(aside)
            with suppress(FileNotFoundError):  # another writer was faster
                os.rename(directory, aside)
        try:
            os.rename(sealed, directory)
            break
        except OSError as error:
            # a reader took the gap for an interrupted replacement and moved the old one back, or another writer was faster
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 2:
                raise
    fsync(directory.parent)
    _discard(aside)


def recover_interrupted(directory: Path) -> None:
    """Finish what a run that died inside `_replace` left: move an old checkpoint back, or delete it if it was replaced."""
    aside = _backup_path(directory)
    if not os.path.lexists(aside):
        return
    if os.path.lexists(directory):
        _discard(aside)
        return
    try:
        os.rename(aside, directory)
    except FileNotFoundError:  # another process was faster
        return


def _delete_leftovers(directory: Path) -> None:
    """Delete what runs that died here left. One that lives finds at its next file that its directory is gone."""
    left = re.compile(rf"\.{re.escape(directory.name)}(\.[0-9a-f]+)?\.writing")
    for path in directory.parent.iterdir():
        if left.fullmatch(path.name):
            with suppress(OSError):
                delete_atomically(path)


def delete_atomically(path: Path) -> None:
    """Delete a checkpoint so that nothing that looks like one is left if that is interrupted: it is renamed first.

    Args:
        path: a checkpoint, or what is left of one.

    Raises:
        OSError: it could not be renamed, or not be deleted whole; what is left of it has a hidden name.
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


def _discard(path: Path) -> None:
    """Delete what may be there: a directory, a file, or a link, but not what that leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _backup_path(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")
