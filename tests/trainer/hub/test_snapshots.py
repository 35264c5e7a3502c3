"""Snapshots of the files to upload."""

import os

import pytest

from fts.trainer.hub import snapshots
from fts.trainer.hub.snapshots import delete_stale_snapshots, take_snapshot


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_snapshot_has_the_checkpoint_and_the_output_directory(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    state = ("optimizer.safetensors", "state.json", "progress.json", "manifest.json", "trainer_state.json", "README.md")
    tree(checkpoint, "model.safetensors", "config.json", *state)
    tree(tmp_path, "README.md", "config.json", "runs/a", ".git/b", "_c", "checkpoint-2/d", ".checkpoint-4.writing/e")
    snapshot = take_snapshot(tmp_path, model=checkpoint, folders={"last-checkpoint": checkpoint})
    inside = [f"last-checkpoint/{name}" for name in (*state, "config.json", "model.safetensors")]
    assert names(snapshot.folder) == sorted(["README.md", "config.json", "model.safetensors", "runs/a", *inside])
    assert os.path.samefile(snapshot.folder / "config.json", checkpoint / "config.json")
    assert not os.path.samefile(snapshot.folder / "README.md", tmp_path / "README.md")  # which programs overwrite in place
    assert snapshot.size == sum(len(name.rpartition("last-checkpoint/")[2]) for name in names(snapshot.folder))
    snapshot.delete()
    assert not snapshot.folder.exists()
    assert (checkpoint / "config.json").read_text() == "config.json"


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(snapshots.os, "link", refuse)
    tree(tmp_path / "checkpoint-1", "model.safetensors")
    snapshot = take_snapshot(tmp_path, model=tmp_path / "checkpoint-1")
    assert (snapshot.folder / "model.safetensors").read_text() == "model.safetensors"


def test_a_failed_snapshot_leaves_no_files(tmp_path, monkeypatch):
    tree(tmp_path, "a")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots.shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left"):
        take_snapshot(tmp_path)
    assert names(tmp_path) == ["a"]


def test_stale_snapshots_are_deleted(tmp_path):
    tree(tmp_path, "a")
    own = take_snapshot(tmp_path)
    dead = tmp_path / f".uploading-{snapshots.socket.gethostname()}-{2**22 + 1}-abc"  # above the largest process id
    elsewhere = tmp_path / ".uploading-another.host-7-abc"
    tree(dead, "x")
    tree(elsewhere, "x")
    delete_stale_snapshots(tmp_path)
    assert own.folder.exists()
    assert elsewhere.exists()
    assert not dead.exists()
    delete_stale_snapshots(tmp_path / "not-there")
