"""Writing files with checksums, and resolving paths that a file names."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path, PurePath

import attrs
import xxhash

from fts.errors import CheckpointError

CHUNK_SIZE = 2**24
"""Bytes that are read or written at once."""

O_DIRECT = getattr(os, "O_DIRECT", 0)


@attrs.frozen
class FileChecksum:
    """Size and checksum of a file.

    Attributes:
        size: in bytes.
        digest: XXH3-128, in hexadecimal digits. It detects corruption, but not forgery: a file with a given digest can be made.
    """

    size: int
    digest: str


def compute_checksum(path: Path) -> FileChecksum:
    """Read a file and compute its checksum."""
    size, digest = 0, xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_SIZE):
            digest.update(chunk)
            size += len(chunk)
    return FileChecksum(size, digest.hexdigest())


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> FileChecksum:
    """Write a file from consecutive chunks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = write_chunks(Path(folder) / "a", [b"one", b"two"])
    ...     written == compute_checksum(Path(folder) / "a"), written.size
    (True, 6)
    """
    size, digest = 0, xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            digest.update(chunk)
            _write_all(file.fileno(), memoryview(chunk))
            size += len(chunk)
    return FileChecksum(size, digest.hexdigest())


def write_direct(path: Path, buffer: memoryview, size: int) -> FileChecksum:
    """Write a file from one buffer with O_DIRECT, that is, without the page cache, where the file system supports it.

    It takes a tenth of the processor time, since the disk reads the memory itself, and keeps the page cache free for files that
    are read again, such as the data.

    Args:
        path: the file; an earlier one is replaced.
        buffer: the bytes of the file, page-aligned and padded to full pages.
        size: of the file, without the padding.
    """
    digest = xxhash.xxh3_128()
    descriptor = _open_direct(path)
    try:
        for start in range(0, len(buffer), CHUNK_SIZE):
            chunk = buffer[start : start + CHUNK_SIZE]
            digest.update(chunk[: size - start])
            _write_all(descriptor, chunk)
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)
    return FileChecksum(size, digest.hexdigest())


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | O_DIRECT, 0o666)
    except OSError as error:
        if not O_DIRECT or error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        try:
            count = os.write(descriptor, chunk)
        except OSError as error:
            # no direct I/O on this file system, or not at this offset (after a write that stopped within a block)
            if error.errno != errno.EINVAL or not _disable_direct_io(descriptor):
                raise
        else:
            chunk = chunk[count:]


def _disable_direct_io(descriptor: int) -> bool:
    if not O_DIRECT:
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~O_DIRECT)
    return bool(flags & O_DIRECT)


def fsync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolve_file(directory: Path, name: str) -> Path:
    """The path of a file whose name comes from a file of the directory, such as a manifest.

    Args:
        directory: that must contain it.
        name: relative to it.

    Returns:
        The path of an existing file.

    Raises:
        CheckpointError: it is missing, not a regular file, or outside the directory: an absolute path, `..`, or a link to a path
            outside.
    """
    remedy = "Use an earlier checkpoint."
    try:
        pure = PurePath(name)
        path = directory / pure
        target = path.resolve()
        is_inside, exists, is_regular = target.is_relative_to(directory.resolve()), path.exists(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a link to itself
        raise CheckpointError(f"The file {name!r} in {str(directory)!r} cannot be read: {error}. {remedy}") from error
    if not pure.name or pure.anchor or ".." in pure.parts:
        raise CheckpointError(f"{directory} has an entry that cannot be used: {name!r} is not inside it. {remedy}")
    if not is_inside:
        raise CheckpointError(f"{path} is a link that leads outside, to {target}. Replace the link with a copy of the file.")
    if not exists:
        raise CheckpointError(f"{path} is missing. {remedy}")
    if not is_regular:
        raise CheckpointError(f"{path} is not a regular file. {remedy}")
    return path
