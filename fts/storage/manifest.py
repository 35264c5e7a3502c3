"""The manifest of a directory: the sizes and checksums of its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fts.errors import CheckpointError
from fts.storage.files import FileChecksum, compute_checksum, fsync, resolve_file
from fts.storage.json_io import read_json

FORMAT = 1
"""Version of the manifest's format."""

MANIFEST = "manifest.json"

CHECKSUM = "xxh3_128"
"""Detects corruption at 25 GB/s, but not forgery: who changes a file can rewrite the manifest, too."""


def write_manifest(directory: Path, checksums: Mapping[str, FileChecksum] | None = None) -> None:
    """Flush all files, list them in the manifest, and flush that too. Links that lead outside become copies.

    Args:
        directory: that gets the manifest.
        checksums: those that are known from writing the files; the other files are read.
    """
    checksums = checksums or {}
    entries = {}
    _replace_links(directory)
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    for path in paths:
        name = path.relative_to(directory).as_posix()
        checksum = checksums.get(name) or compute_checksum(path)
        entries[name] = {"size": checksum.size, CHECKSUM: checksum.digest}
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": entries}, indent=2) + "\n", encoding="utf-8")
    for path in [*paths, directory / MANIFEST]:
        fsync(path)
    for path in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        fsync(path)


def _replace_links(directory: Path) -> None:
    """Replace links to files outside, and absolute links into this directory, which will move, by copies."""
    inside = directory.resolve()
    for path in directory.rglob("*"):
        if path.is_symlink() and path.is_file():
            target = path.resolve()
            if path.readlink().is_absolute() or not target.is_relative_to(inside):
                path.unlink()
                shutil.copyfile(target, path)


def verify_files(directory: Path, required: Callable[[], Any] | None = None, *, shard: tuple[int, int] = (0, 1)) -> None:
    """Verify all files that the manifest of a directory lists; other files are ignored, and never read.

    Args:
        directory: with a manifest.
        required: gives the names that the manifest must list; called when those that it lists are valid.
        shard: of the files to read, where several processes divide them: (rank, world size).

    Raises:
        CheckpointError: a file is missing or corrupt; the message names it.
    """
    manifest = directory / MANIFEST
    files = read_json(directory, MANIFEST, version=FORMAT).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{manifest} does not list the checkpoint's files. Use an earlier checkpoint.")
    rank, size = shard
    for index, (name, entry) in enumerate(files.items()):
        if not isinstance(entry, dict) or not isinstance(entry.get(CHECKSUM), str):
            raise CheckpointError(f"{manifest} has an entry that cannot be used: {name!r} has no {CHECKSUM}.")
        if index % size == rank:
            _verify(directory, name, entry)
    for name in required() if required is not None else ():
        if name not in files:
            raise CheckpointError(f"{manifest} does not list {name}, so nothing vouches for it. Use an earlier checkpoint.")


def _verify(directory: Path, name: str, entry: dict[str, Any]) -> None:
    remedy = "The checkpoint is corrupt; use an earlier one."
    path = resolve_file(directory, name)
    try:
        size = path.stat().st_size
        if size != entry.get("size"):
            raise CheckpointError(f"{path} has {size} bytes, but was written with {entry.get('size')}. {remedy}")
        checksum = compute_checksum(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {remedy}") from error
    if checksum.digest != entry[CHECKSUM]:
        raise CheckpointError(f"{path} has changed since it was written: its checksum differs. {remedy}")
