import os
import shutil
import subprocess

import pytest
import xxhash

from fts.errors import CheckpointError
from fts.storage import StagingBuffer, compute_checksum, resolve_file, split_into_shards, write_direct
from fts.storage.files import CHUNK_SIZE, O_DIRECT, write_chunks


def buffer_of(size):
    """Random bytes, page-aligned and padded to full pages."""
    import torch

    buffer = StagingBuffer()
    (view,) = buffer.copy_from(split_into_shards("a", {"x": torch.randint(0, 256, (size,), dtype=torch.uint8)}).files)
    return view, split_into_shards("a", {"x": torch.empty(size, dtype=torch.uint8)}).files[0].size, buffer


@pytest.fixture(params=["disk", "tmpfs"])
def folder(request, tmp_path):
    if request.param == "disk":
        yield tmp_path
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("size", [0, 1, 4096, CHUNK_SIZE - 1, CHUNK_SIZE + 5])
def test_a_buffer_is_written_as_it_is(folder, size):
    view, length, _buffer = buffer_of(size)
    path = folder / "file"
    path.write_bytes(b"an earlier and longer file" * 1000)
    written = write_direct(path, view, length)
    content = path.read_bytes()
    assert content == bytes(view[:length]) and written.size == length == len(content)
    assert written.digest == xxhash.xxh3_128(content).hexdigest()
    assert written == compute_checksum(path)


def test_a_write_that_stops_within_a_block_continues(tmp_path, monkeypatch):
    """From that offset the kernel refuses O_DIRECT writes."""
    write, short = os.write, []

    def stopping(descriptor, part):
        if not short:
            short.append(write(descriptor, part[:4096]) if O_DIRECT else 0)
            os.truncate(tmp_path / "file", 100)
            os.lseek(descriptor, 100, os.SEEK_SET)
            return 100
        return write(descriptor, part)

    view, length, _buffer = buffer_of(100_000)
    monkeypatch.setattr(os, "write", stopping)
    written = write_direct(tmp_path / "file", view, length)
    monkeypatch.undo()
    assert short and (tmp_path / "file").read_bytes() == bytes(view[:length])
    assert written == compute_checksum(tmp_path / "file")


def test_an_error_of_the_disk_is_raised(tmp_path):
    view, length, _buffer = buffer_of(10)
    with pytest.raises(IsADirectoryError):
        write_direct(tmp_path, view, length)
    with pytest.raises(FileNotFoundError):
        write_chunks(tmp_path / "nowhere" / "file", [b"a"])


def test_files_are_inside_their_directory(tmp_path):
    root = tmp_path / "checkpoint"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "outside").write_text("secret")
    (root / "a").write_text("a")
    (root / "sub" / "b").write_text("b")
    (root / "inner").symlink_to("sub/b")
    (root / "out").symlink_to("../outside")
    (root / "sub" / "up").symlink_to(tmp_path)
    (root / "round").symlink_to("round")
    (root / "dangling").symlink_to("nothing")
    os.mkfifo(root / "pipe")
    for name in ("a", "sub/b", "inner"):
        assert resolve_file(root, name).read_text() == resolve_file(root, name).name[0].replace("i", "b")
    (tmp_path / "linked").symlink_to(root)  # the checkpoint itself may be a link
    assert resolve_file(tmp_path / "linked", "a").read_text() == "a"
    for name, message in {
        "out": "a link that leads outside",
        "sub/up/outside": "a link that leads outside",
        "../outside": "is not inside it",
        "sub/../../outside": "is not inside it",
        str(tmp_path / "outside"): "is not inside it",
        "": "is not inside it",
        ".": "is not inside it",
        "round": "cannot be read|missing",
        "dangling": "missing",
        "nowhere": "missing",
        "pipe": "not a regular file",
        "sub": "not a regular file",
        "a\0": "cannot be read",
        "\ud800": "cannot be read",
        "x" * 5000: "cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            resolve_file(root, name)
