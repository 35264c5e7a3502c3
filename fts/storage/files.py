"""Files that are written in one go, and read with suspicion."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path, PurePath

import attrs
import xxhash

from fts.errors import CheckpointError

CHUNK_SIZE = 2**24
"""Bytes that are read or written at a time."""

O_DIRECT = getattr(os, "O_DIRECT", 0)


@attrs.frozen
class FileChecksum:
    """What tells whether a file is still as it was written.

    Attributes:
        size: in bytes.
        digest: XXH3-128, in hexadecimal digits. It finds damage; against a forger, who can make a file of any digest, it
            is no protection.
    """

    size: int
    digest: str


def compute_checksum(path: Path) -> FileChecksum:
    """Size and checksum of a file, by reading it."""
    size, digest = 0, xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_SIZE):
            digest.update(chunk)
            size += len(chunk)
    return FileChecksum(size, digest.hexdigest())


def write_chunks(path: Path, parts: Iterable[bytes | memoryview]) -> FileChecksum:
    """Write a file from parts that follow each other.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = write_chunks(Path(folder) / "a", [b"one", b"two"])
    ...     written == compute_checksum(Path(folder) / "a"), written.size
    (True, 6)
    """
    size, digest = 0, xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        for part in parts:
            digest.update(part)
            _write_all(file.fileno(), memoryview(part))
            size += len(part)
    return FileChecksum(size, digest.hexdigest())


def write_direct(path: Path, image: memoryview, size: int) -> FileChecksum:
    """Write a file that lies in memory as a whole, past the system's cache where the file system lets us.

    A write past the cache costs a tenth of the processor time: the disk reads the memory itself. It also leaves the cache to
    what is read again, such as the data.

    Args:
        path: the file; an earlier one is replaced.
        image: its bytes from a page boundary on, and as many more as fill the last page.
        size: how many of them are the file's.
    """
    digest = xxhash.xxh3_128()
    descriptor = _open_direct(path)
    try:
        for start in range(0, len(image), CHUNK_SIZE):
            chunk = image[start : start + CHUNK_SIZE]
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


def _write_all(descriptor: int, part: memoryview) -> None:
    while part:
        try:
            count = os.write(descriptor, part)
        except OSError as error:
            # the file system cannot write past the cache, or not from here (after a write that stopped within a block)
            if error.errno != errno.EINVAL or not _disable_direct_io(descriptor):
                raise
        else:
            part = part[count:]


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
    """The path of a file that a document names.

    Args:
        directory: where it must lie.
        name: relative to it.

    Returns:
        The path, of a file that is there.

    Raises:
        CheckpointError: it is missing, no regular file, or not in the directory: an absolute path, `..`, or a link that leads
            outside.
    """
    remedy = "Use an earlier checkpoint."
    try:
        pure = PurePath(name)
        path = directory / pure
        target = path.resolve()
        here, there, regular = target.is_relative_to(directory.resolve()), path.exists(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, a link to itself
        raise CheckpointError(f"The file {name!r} in {str(directory)!r} cannot be read: {error}. {remedy}") from error
    if not pure.name or pure.anchor or ".." in pure.parts:
        raise CheckpointError(f"{directory} has an entry that cannot be used: {name!r} does not lie in it. {remedy}")
    if not here:
        raise CheckpointError(f"{path} is a link that leads outside, to {target}. Copy the file into its place.")
    if not there:
        raise CheckpointError(f"{path} is missing. {remedy}")
    if not regular:
        raise CheckpointError(f"{path} is no regular file. {remedy}")
    return path
