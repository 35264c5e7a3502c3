import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors
import torch

import fts
from fts import transforms as tx
from fts.errors import ArgumentError, CheckpointError
from fts.loops import Position, load_checkpoint, newest_checkpoint, save_checkpoint
from fts.loops.checkpoint_status import is_complete
from fts.loops.checkpoints import load_extra, verify_checkpoint
from fts.storage.manifest import write_manifest

OPTIMIZER = tx.adamw(1e-3)


def state_at(step):
    state = fts.TrainState.create({"w": torch.full((4, 3), float(step)), "b": torch.arange(3.0)}, OPTIMIZER, seed=7)
    return state.replace(step=torch.tensor(step))


def saved(root, step, **options):
    return save_checkpoint(Path(root) / f"checkpoint-{step}", state_at(step), Position(step, 1), **options)


def step_of(path):
    state, position = load_checkpoint(path, like=state_at(0))
    step = int(state.step)
    assert torch.equal(state.params["w"], state_at(step).params["w"])
    assert position == Position(step, 1)
    return step


def test_round_trip(tmp_path):
    path = saved(tmp_path / "deep" / "er", 3, extra={"log": [{"loss": 0.5}], "best": None})
    assert path == tmp_path / "deep" / "er" / "checkpoint-3"
    assert step_of(path) == 3
    assert load_extra(path) == {"log": [{"loss": 0.5}], "best": None}
    assert load_extra(saved(tmp_path, 4)) == {}
    assert {entry.name for entry in path.parent.iterdir()} == {"checkpoint-3"}


def test_the_manifest_lists_every_file(tmp_path):
    def write(directory):
        (directory / "config.json").write_text("{}")
        (directory / "tokenizer").mkdir()
        (directory / "tokenizer" / "vocabulary.txt").write_text("a b c")

    path = saved(tmp_path, 1, write=write)
    files = json.loads((path / "manifest.json").read_text())["files"]
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files.keys() == present - {"manifest.json"}
    assert {"model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer/vocabulary.txt"} < files.keys()
    assert files["tokenizer/vocabulary.txt"]["size"] == 5
    (path / "tokenizer" / "vocabulary.txt").write_text("a b d")
    with pytest.raises(CheckpointError, match=r"vocabulary.txt has changed"):
        verify_checkpoint(path)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "progress.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("corruption", ["missing", "truncated", "emptied", "flipped", "longer"])
def test_corruption_is_found_and_an_earlier_checkpoint_used(tmp_path, name, corruption):
    saved(tmp_path, 9)
    path = saved(tmp_path, 10)
    file = path / name
    content = file.read_bytes()
    if corruption == "missing":
        file.unlink()
    elif corruption == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 0x80]) + content[middle + 1 :])
    else:
        file.write_bytes({"truncated": content[:-7], "emptied": b"", "longer": content + b"x"}[corruption])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_checkpoint(path, like=state_at(0))
    assert step_of(newest_checkpoint(tmp_path)) == 9


@pytest.mark.parametrize("index", range(0, 2000, 97))
def test_any_flipped_bit_is_found(tmp_path, index):
    path = saved(tmp_path, 1)
    files = sorted(p for p in path.iterdir() if p.name != "manifest.json")
    file = files[index % len(files)]
    content = bytearray(file.read_bytes())
    content[index % len(content)] ^= 1 << (index % 8)
    file.write_bytes(content)
    assert not is_complete(path)


def test_newest_is_by_number_and_passes_over_what_is_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert newest_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        saved(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / ".checkpoint-13.writing").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_messages(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "checkpoint-1", like=state_at(0))
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        load_checkpoint(tmp_path / "checkpoint-1", like=state_at(0))
    path = saved(tmp_path, 2)
    (path / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(CheckpointError, match=r"has 5 bytes, but was written with \d+\. .*use an earlier one"):
        load_checkpoint(path, like=state_at(0))
    with pytest.raises(ArgumentError, match="must be JSON-serializable"):
        saved(tmp_path, 3, extra={"tensor": torch.zeros(1)})
    other = fts.TrainState.create({"v": torch.zeros(2)}, OPTIMIZER)
    with pytest.raises(CheckpointError, match="another model"):
        load_checkpoint(saved(tmp_path, 4), like=other)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_cannot_lead_outside(tmp_path, name):
    path = saved(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "xxh3_128": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be used"):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", FILES)
def test_a_link_that_leads_outside_is_an_error(tmp_path, name):
    path = saved(tmp_path, 1)
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    reads = {"progress.json": load_extra, "manifest.json": verify_checkpoint}
    read = reads.get(name, lambda path: fts.TrainState.load(path, like=state_at(0)))
    for reader in (read, lambda path: load_checkpoint(path, like=state_at(0))):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is a link that leads outside"):
            reader(path)


@pytest.mark.parametrize(
    "manifest",
    [
        '{"format": 1, "files": {"a": {}, "a": {}}}',
        '{"format": 1, "files": {"state.json": {"size": NaN, "xxh3_128": ""}}}',
        '{"format": 1, "files": {"state.json": {"size": ' + "9" * 4000 + ', "xxh3_128": ""}}}',
        '{"format": 1, "files": {"state.json": {"size": ' + "9" * 5000 + ', "xxh3_128": ""}}}',
        '{"format": 1, "files": {"state.json": {"size": 1, "sha256": ""}}}',
        '{"format": 1, "files": {"state.json": 1}}',
        '{"format": 1, "files": {"": {"size": 1, "xxh3_128": ""}}}',
        '{"format": 1, "files": ["state.json"]}',
        '{"format": true, "files": {}}',
        '{"format": 1, "files": {}}',
        '"format"',
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, manifest):
    path = saved(tmp_path, 1)
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, like=state_at(0))


def test_shards_are_vouched_for_too(tmp_path):
    path = saved(tmp_path, 3, shard_size=20)
    assert not (path / "model.safetensors").exists() and step_of(path) == 3
    names = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".safetensors")
    assert len(names) > 3
    manifest = json.loads((path / "manifest.json").read_text())
    for name in [*names, "model.safetensors.index.json"]:
        files = {key: value for key, value in manifest["files"].items() if key != name}
        (path / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(CheckpointError, match=f"manifest.json does not list {name}"):
            load_checkpoint(path, like=state_at(0))
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "model.safetensors").write_bytes(b"a file that would be read in their place")
    with pytest.raises(CheckpointError, match=r"manifest\.json does not list model\.safetensors"):
        load_checkpoint(path, like=state_at(0))


def test_frozen_parameters_can_be_left_out(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 1))
    state = fts.TrainState.create(net, OPTIMIZER)
    path = save_checkpoint(tmp_path / "checkpoint-1", state, frozen=False)
    loaded, _ = load_checkpoint(path, like=state)
    assert torch.equal(loaded.frozen["0.weight"], net[0].weight)
    assert (path / "trained.safetensors").exists() and not (path / "model.safetensors").exists()
    (path / "trained.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"trained\.safetensors is missing"):
        load_checkpoint(path, like=state)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "", "x" * 5000])
def test_names_that_are_not_files_are_errors(tmp_path, name):
    path = saved(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "xxh3_128": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "progress.json"])
def test_the_manifest_must_list_what_is_loaded(tmp_path, name):
    saved(tmp_path, 1)
    path = saved(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][name]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json does not list {name}"):
        load_checkpoint(path, like=state_at(0))
    assert step_of(newest_checkpoint(tmp_path)) == 1


@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
def test_deeply_nested_json_is_a_corrupt_checkpoint(tmp_path, name):
    saved(tmp_path, 1)
    path = saved(tmp_path, 2)
    (path / name).write_text('{"format": 1, "extra": ' + "[" * 100_000)
    if name == "progress.json":
        (path / "manifest.json").unlink()
        write_manifest(path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_extra(path)
    else:
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load_checkpoint(path, like=state_at(0))


def test_a_state_must_write_what_a_checkpoint_is_loaded_from(tmp_path):
    class Odd:
        def save(self, directory):
            (directory / "odd.json").write_text("{}")

    with pytest.raises(ArgumentError, match=r"Odd.*model\.safetensors"):
        save_checkpoint(tmp_path / "checkpoint-1", Odd())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        '{"format": 2}',
        '{"format": 1, "epoch": -1, "batch": 0}',
        '{"format": 1, "epoch": 0, "batch": 9223372036854775808}',
        '{"format": 1}',
    ],
)
def test_progress_is_checked_even_if_the_manifest_fits(tmp_path, document):
    path = saved(tmp_path, 1)
    (path / "progress.json").write_text(document)
    (path / "manifest.json").unlink()
    write_manifest(path)
    with pytest.raises(CheckpointError, match=r"progress\.json"):
        load_checkpoint(path, like=state_at(0))


# -- crashes ------------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


def crash_after(monkeypatch, calls):
    """Everything that changes the disk works `calls` times, and then the process counts as dead."""
    left = calls

    def dying(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "rename"), (os, "fsync"), (shutil, "rmtree"), (Path, "write_text"), (Path, "mkdir")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("again", [False, True])
def test_a_crash_at_any_call_leaves_a_complete_checkpoint(tmp_path, again):
    """`again`: the checkpoint that is being written replaces one of the same name."""
    for calls in range(100):
        root = tmp_path / str(calls)
        before = saved(root, 5)
        target = before if again else root / "checkpoint-6"
        with pytest.MonkeyPatch.context() as monkeypatch:
            crash_after(monkeypatch, calls)
            try:
                save_checkpoint(target, state_at(6), Position(6, 1))
                died = False
            except Crash:
                died = True
        assert step_of(newest_checkpoint(root)) in (5, 6)
        assert step_of(before) in ((5, 6) if again else (5,))
        save_checkpoint(target, state_at(6), Position(6, 1))
        assert step_of(newest_checkpoint(root)) == 6
        assert [p.name for p in root.iterdir() if p.name.startswith(".")] == []
        if not died:
            break
    assert calls > 10


def test_a_replaced_checkpoint_is_found_by_load_alone(tmp_path):
    path = saved(tmp_path, 5)
    os.rename(path, tmp_path / ".checkpoint-5.replaced")
    assert step_of(path) == 5


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    saved(tmp_path, 5)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for step in (5, 6):
        with pytest.raises(CheckpointError, match=r"checkpoint-.*No space left.*[Ee]arlier checkpoints are complete"):
            saved(tmp_path, step)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-5"}
    assert step_of(newest_checkpoint(tmp_path)) == 5


def test_the_error_of_safetensors_for_a_full_disk_is_a_checkpoint_error(tmp_path):
    """Users' own models are saved by it."""
    saved(tmp_path, 5)

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(
        CheckpointError, match=r"checkpoint-6 could not be written.*No space left.*Earlier checkpoints are complete"
    ):
        saved(tmp_path, 6, write=full)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-5"}
    assert step_of(newest_checkpoint(tmp_path)) == 5


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        saved(disk, 5)
        state = fts.TrainState.create({"w": torch.zeros(100_000)}, OPTIMIZER)
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(disk / "checkpoint-6", state)
        assert {p.name for p in disk.iterdir()} == {"checkpoint-5"}
        assert step_of(newest_checkpoint(disk)) == 5
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        saved(tmp_path / "file", 5)


def test_a_failing_write_hook_leaves_nothing(tmp_path):
    def write(directory):
        raise ValueError("no config")

    with pytest.raises(ValueError, match="no config"):
        saved(tmp_path, 5, write=write)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_moves_the_old_one_back_does_not_fail_the_save(tmp_path, monkeypatch):
    saved(tmp_path, 5)
    rename, disturbed = os.rename, []

    def slow(source, target):
        if str(source).endswith(".writing") and not disturbed:
            disturbed.append(newest_checkpoint(tmp_path))
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    save_checkpoint(tmp_path / "checkpoint-5", state_at(6), Position(6, 1))
    assert disturbed == [tmp_path / "checkpoint-5"]
    assert step_of(tmp_path / "checkpoint-5") == 6
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-5"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("milliseconds", [3, 7, 11, 16, 23, 31])
def test_a_killed_process_leaves_complete_checkpoints(tmp_path, milliseconds):
    saved(tmp_path, 0)
    child = os.fork()
    if child == 0:
        try:
            for step in range(1, 10**6):
                saved(tmp_path, step)
                save_checkpoint(tmp_path / "checkpoint-0", state_at(step), Position(step, 1))
        finally:
            os._exit(1)
    time.sleep(milliseconds / 1000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = newest_checkpoint(tmp_path)
    assert step_of(newest) == int(newest.name.removeprefix("checkpoint-"))
    step_of(tmp_path / "checkpoint-0")
    for path in tmp_path.glob("checkpoint-*"):
        assert is_complete(path)
    assert step_of(saved(tmp_path, 10**6)) == 10**6


# -- pickles ------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_planted_pickles_are_never_loaded(tmp_path):
    exploded = tmp_path / "exploded"
    path = saved(tmp_path, 1)
    bomb = pickle.dumps(Bomb(exploded))
    for name in ("optimizer.pt", "scheduler.pt", "pytorch_model.bin", "training_args.bin", "rng_state.pth", "state.pkl"):
        (path / name).write_bytes(bomb)
    assert step_of(newest_checkpoint(tmp_path)) == 1
    for name in FILES:
        content = (path / name).read_bytes()
        (path / name).write_bytes(bomb)
        if name != "manifest.json":  # as an attacker would
            (path / "manifest.json").unlink()
            write_manifest(path)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_checkpoint(path, like=state_at(0))
        (path / name).write_bytes(content)
        write_manifest(path)
    assert not exploded.exists()
    pickle.loads(bomb)  # noqa: S301
    assert exploded.exists()  # it would have worked


def test_only_a_state_that_can_be_saved_is_accepted(tmp_path):
    with pytest.raises(ArgumentError, match=r"dict.*save"):
        save_checkpoint(tmp_path / "checkpoint-1", {"w": torch.zeros(1)})


def test_leftovers_of_a_save_are_deleted_when_it_is_repeated(tmp_path):
    for name in (".checkpoint-5.writing", ".checkpoint-5.0123abcd.writing", ".checkpoint-51.0123abcd.writing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    saved(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", ".checkpoint-51.0123abcd.writing"}


@pytest.mark.parametrize("kind", ["file", "dangling", "link"])
def test_other_directories_are_replaced_and_links_are_not_followed(tmp_path, kind):
    root, other = tmp_path / "run", tmp_path / "other"
    root.mkdir(), other.mkdir()
    (other / "mine.txt").write_text("mine")
    if kind == "file":
        (root / "checkpoint-5").write_text("mine")
    else:
        (root / "checkpoint-5").symlink_to(tmp_path / "nowhere" if kind == "dangling" else other)
    assert step_of(saved(root, 5)) == 5
    assert not (root / "checkpoint-5").is_symlink() and [path.name for path in root.iterdir()] == ["checkpoint-5"]
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_links_that_lead_outside_become_copies(tmp_path):
    root, base = tmp_path / "run", tmp_path / "base.bin"
    base.write_bytes(b"base")

    def write(hidden):
        (hidden / "sub").mkdir()
        (hidden / "sub" / "up.bin").symlink_to(os.path.relpath(base, hidden / "sub"))
        (hidden / "base.bin").symlink_to(base)
        (hidden / "own.json").write_text("{}")
        (hidden / "moves.json").symlink_to(hidden / "own.json")
        (hidden / "stays.json").symlink_to("own.json")
        (hidden / "dangling").symlink_to("nowhere")

    path = saved(root, 5, write=write)
    base.unlink()
    assert is_complete(path) and step_of(path) == 5
    assert (path / "base.bin").read_bytes() == (path / "sub" / "up.bin").read_bytes() == b"base"
    assert (path / "moves.json").read_text() == "{}" and not (path / "moves.json").is_symlink()
    assert (path / "stays.json").is_symlink()
