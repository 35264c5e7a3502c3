"""Snapshots of the files to upload: trees of hard links, which checkpoint rotation and later saves cannot change."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import attrs

PREFIX = ".uploading"
TRAINING_FILES = ("optimizer*", "trained*", "progress.json", "state.json", "manifest.json", "trainer_state.json", "README.md")
"""Files of a checkpoint that belong to the run, not to the model. (peft's README.md is left out: the run has its own card.)"""

MAX_COPY_BYTES = 16 * 2**20
"""Files of `output_dir` up to this size are copied, since programs overwrite them in place."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@attrs.frozen
class Snapshot:
    """Files as they were at an instant.

    Attributes:
        folder: has the files at their paths in the repository.
        replaced: folders in it that replace those of the repository.
    """

    folder: Path
    replaced: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def delete(self) -> None:
        """Delete the links; the files that they link to stay."""
        atexit.unregister(self.delete)
        shutil.rmtree(self.folder, ignore_errors=True)


def take_snapshot(
    root: Path, *, model: Path | None = None, folders: Mapping[str, Path] | None = None, replaced: tuple[str, ...] = ()
) -> Snapshot:
    """Take a snapshot of the files to upload.

    Args:
        root: the output directory, whose files go to the root of the repository; checkpoints and names that begin with "." or
            "_" are left out.
        model: a checkpoint whose model replaces that of `root`.
        folders: further directories, by their names in the repository.
        replaced: see `Snapshot`.

    Raises:
        OSError: the disk is full, or a file has gone.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_prefix_of_process()}-", dir=root))
    try:
        for path in _uploaded_files(root):
            _link(path, folder / path.relative_to(root), copy=path.stat().st_size <= MAX_COPY_BYTES)
        if model is not None:
            for path in sorted(model.iterdir()):
                if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in TRAINING_FILES):
                    _link(path, folder / path.name)
        for name, source in (folders or {}).items():
            for path in sorted(source.rglob("*")):
                if path.is_file():
                    _link(path, folder / name / path.relative_to(source))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    snapshot = Snapshot(folder, replaced)
    atexit.register(snapshot.delete)  # the program may end before the upload
    return snapshot


def delete_stale_snapshots(root: Path) -> None:
    """Delete the snapshots that killed runs left on this machine."""
    pattern = re.compile(rf"{re.escape(PREFIX)}-{re.escape(socket.gethostname())}-(\d+)-\w+")
    for path in root.glob(f"{PREFIX}-*") if root.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _prefix_of_process() -> str:
    return f"{PREFIX}-{socket.gethostname()}-{os.getpid()}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it belongs to another user
    return True


def _uploaded_files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.name.startswith((".", "_")) or _CHECKPOINT.fullmatch(path.name):
            continue
        if path.is_dir():
            yield from _uploaded_files(path)
        elif path.is_file():
            yield path


def _link(source: Path, target: Path, *, copy: bool = False) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if not copy:
        with suppress(OSError):  # a file system without hard links
            os.link(source, target)
            return
    shutil.copy2(source, target)
