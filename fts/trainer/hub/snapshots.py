"""What is uploaded, held fast: a tree of hard links, which rotation and later saves cannot change."""

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
OF_TRAINING = ("optimizer*", "trained*", "progress.json", "state.json", "manifest.json", "trainer_state.json", "README.md")
"""Files of a checkpoint that are of the run, not of the model. (peft writes a README.md; the repository gets the run's card.)"""

COPIED = 16 * 2**20
"""Files of `output_dir` up to this size are copied, since programs write them in place."""

_CHECKPOINT = re.compile(r"checkpoint-\d+")


@attrs.frozen
class Snapshot:
    """Files as they were at an instant.

    Attributes:
        folder: has them as the repository shall have them.
        replaced: folders in it that take the place of those in the repository.
    """

    folder: Path
    replaced: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def drop(self) -> None:
        """Forget it: the links go, the files stay where they were."""
        atexit.unregister(self.drop)
        shutil.rmtree(self.folder, ignore_errors=True)


def take(
    root: Path, *, model: Path | None = None, folders: Mapping[str, Path] | None = None, replaced: tuple[str, ...] = ()
) -> Snapshot:
    """Hold fast what is to be uploaded.

    Args:
        root: the output directory, whose files go to the root of the repository; not checkpoints, nor what is hidden or begins
            with an underscore.
        model: a checkpoint whose model takes the place of that in `root`.
        folders: further directories, by their names in the repository.
        replaced: see `Snapshot`.

    Raises:
        OSError: the disk is full, or a file has gone.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_own_prefix()}-", dir=root))
    try:
        for path in _files_of(root):
            _link(path, folder / path.relative_to(root), copied=path.stat().st_size <= COPIED)
        if model is not None:
            for path in sorted(model.iterdir()):
                if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in OF_TRAINING):
                    _link(path, folder / path.name)
        for name, source in (folders or {}).items():
            for path in sorted(source.rglob("*")):
                if path.is_file():
                    _link(path, folder / name / path.relative_to(source))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    taken = Snapshot(folder, replaced)
    atexit.register(taken.drop)  # where the program ends before the upload
    return taken


def drop_leftovers(root: Path) -> None:
    """Delete the snapshots of runs that died on this machine."""
    pattern = re.compile(rf"{re.escape(PREFIX)}-{re.escape(socket.gethostname())}-(\d+)-\w+")
    for path in root.glob(f"{PREFIX}-*") if root.is_dir() else ():
        found = pattern.fullmatch(path.name)
        if found and not _is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _own_prefix() -> str:
    return f"{PREFIX}-{socket.gethostname()}-{os.getpid()}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # of another user
    return True


def _files_of(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.name.startswith((".", "_")) or _CHECKPOINT.fullmatch(path.name):
            continue
        if path.is_dir():
            yield from _files_of(path)
        elif path.is_file():
            yield path


def _link(source: Path, target: Path, *, copied: bool = False) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if not copied:
        with suppress(OSError):  # a file system without hard links
            os.link(source, target)
            return
    shutil.copy2(source, target)
