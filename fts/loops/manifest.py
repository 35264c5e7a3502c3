"""What a sealed directory says of its files: sizes and checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path, PurePath
from typing import Any

from fts.errors import CheckpointError

FORMAT = 1
"""Version of the files that `save_checkpoint` writes beside those of the state."""

MANIFEST = "manifest.json"


def seal(directory: Path) -> None:
    """Flush every file, list them in the manifest, and flush that too."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": digest_of(path)} for path in paths}
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")
    for path in [*paths, directory / MANIFEST]:
        flush(path)
    for path in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        flush(path)


def verify_files(directory: Path, required: Collection[str] = ()) -> None:
    """Compare every file that a sealed directory's manifest lists with it; other files are ignored, and never read.

    Args:
        directory: a sealed one.
        required: names that the manifest must list.

    Raises:
        CheckpointError: it names the file and says what is wrong with it.
    """
    manifest = directory / MANIFEST
    files = read_json(manifest).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{manifest} does not list the checkpoint's files. Use an earlier checkpoint.")
    for name in required:
        if name not in files:
            raise CheckpointError(f"{manifest} does not list {name}, so nothing vouches for it. Use an earlier checkpoint.")
    for name, entry in files.items():
        if PurePath(name).anchor or ".." in PurePath(name).parts or not isinstance(entry, dict):
            raise CheckpointError(f"{manifest} has an entry that cannot be used: {name!r}.")
        _verify(directory / name, entry)


def _verify(path: Path, entry: dict[str, Any]) -> None:
    remedy = "The checkpoint is damaged; use an earlier one."
    try:
        size = path.stat().st_size
        if size != entry.get("size"):
            raise CheckpointError(f"{path} has {size} bytes, but was written with {entry.get('size')}. {remedy}")
        digest = digest_of(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}. {remedy}") from error
    if digest != entry.get("sha256"):
        raise CheckpointError(f"{path} has changed since it was written: its SHA-256 differs. {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """An object of this format.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, so this is no complete checkpoint.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(f"{path} has format {found!r}; this version of fts reads format {FORMAT}.")
    return document


def digest_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
