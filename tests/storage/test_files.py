import os
import shutil
import subprocess

import pytest
import xxhash

from fts.errors import CheckpointError
from fts.storage import StagingBuffer, compute_checksum, resolve_file, split_into_shards, write_direct
from fts.storage.files import CHUNK_SIZE, O_DIRECT, write_chunks


def image_of(size):
    """Random bytes from a page boundary on, and what fills the last page."""
    import torch

    image = StagingBuffer()
    (view,) = image.copy_from(split_into_shards("a", {"x": torch.randint(0, 256, (size,), dtype=torch.uint8)}).files)
    return view, split_into_shards("a", {"x": torch.empty(size, dtype=torch.uint8)}).files[0].size, image


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
def test_an_image_is_written_as_it_is(folder, size):
    view, length, _kept = image_of(size)
    path = folder / "file"
    path.write_bytes(b"an earlier and longer file" * 1000)
    written = write_direct(path, view, length)
    content = path.read_bytes()
    assert content == bytes(view[:length]) and written.size == length == len(content)
    assert written.digest == xxhash.xxh3_128(content).hexdigest()
    assert written == compute_checksum(path)


def test_a_write_that_stops_within_a_block_goes_on(tmp_path, monkeypatch):
    """From there the kernel refuses to write past the cache."""
    write, short = os.write, []

    def stopping(descriptor, part):
        if not short:
            short.append(write(descriptor, part[:4096]) if O_DIRECT else 0)
            os.truncate(tmp_path / "file", 100)
            os.lseek(descriptor, 100, os.SEEK_SET)
            return 100
        return write(descriptor, part)

    view, length, _kept = image_of(100_000)
    monkeypatch.setattr(os, "write", stopping)
    written = write_direct(tmp_path / "file", view, length)
    monkeypatch.undo()
    assert short and (tmp_path / "file").read_bytes() == bytes(view[:length])
    assert written == compute_checksum(tmp_path / "file")


def test_an_error_of_the_disk_is_raised(tmp_path):
    view, length, _kept = image_of(10)
    with pytest.raises(IsADirectoryError):
        write_direct(tmp_path, view, length)
    with pytest.raises(FileNotFoundError):
        write_chunks(tmp_path / "nowhere" / "file", [b"a"])


def test_files_lie_in_their_directory(tmp_path):
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
    (tmp_path / "linked").symlink_to(root)  # the whole checkpoint may be a link
    assert resolve_file(tmp_path / "linked", "a").read_text() == "a"
    for name, message in {
        "out": "a link that leads outside",
        "sub/up/outside": "a link that leads outside",
        "../outside": "does not lie in it",
        "sub/../../outside": "does not lie in it",
        str(tmp_path / "outside"): "does not lie in it",
        "": "does not lie in it",
        ".": "does not lie in it",
        "round": "cannot be read|missing",
        "dangling": "missing",
        "nowhere": "missing",
        "pipe": "no regular file",
        "sub": "no regular file",
        "a\0": "cannot be read",
        "\ud800": "cannot be read",
        "x" * 5000: "cannot be read",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            resolve_file(root, name)
