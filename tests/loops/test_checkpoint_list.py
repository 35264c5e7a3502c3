"""The checkpoints of a directory, and which one a run resumes from."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from fts.loops import newest_checkpoint
from fts.loops.checkpoint_list import best_checkpoint_step, list_checkpoints
from fts.loops.checkpoint_status import looks_complete
from tests.loops.checkpoint_files import flip_a_bit, names_in, save, save_model, truncate


def statuses(root):
    return {one.step: one.status for one in list_checkpoints(root)}


def one_of_each(root):
    save(root, 1)
    truncate(save(root, 2))
    flip_a_bit(save(root, 3))
    (save(root, 4) / "optimizer.safetensors").unlink()
    (save(root, 5) / "manifest.json").unlink()
    save_model(root, 6)
    (root / "checkpoint-7").mkdir()
    (root / "checkpoint-8").mkdir()
    (root / "checkpoint-8" / "pytorch_model.bin").write_bytes(b"weights")
    document = json.loads((save(root, 9) / "manifest.json").read_text())
    (root / "checkpoint-9" / "manifest.json").write_text(json.dumps(document | {"format": 99}))
    shutil.copytree(root / "checkpoint-1", root / ".checkpoint-10.writing")
    shutil.copytree(root / "checkpoint-1", root / ".checkpoint-11.deleting")
    (root / "checkpoint-x").mkdir()
    (root / "runs").mkdir()


@pytest.mark.parametrize("name", ["manifest.json", "trainer_state.json"])
def test_a_pipe_instead_of_a_file_does_not_hang(tmp_path, name):
    path = save(tmp_path, 1, history=[])
    (path / name).unlink()
    os.mkfifo(path / name)
    assert [found.status for found in list_checkpoints(tmp_path)] == ["corrupt"]
    assert newest_checkpoint(tmp_path) is None
    assert not looks_complete(path)


def test_the_status_of_each_and_its_problem(tmp_path):
    one_of_each(tmp_path)
    before = names_in(tmp_path)
    found = {one.step: one for one in list_checkpoints(tmp_path)}
    assert statuses(tmp_path) == {
        1: "complete", 2: "corrupt", 3: "corrupt", 4: "corrupt", 5: "corrupt", 6: "model only", 7: "corrupt", 8: "unknown",
        9: "unknown", 10: "interrupted", 11: "interrupted",
    }  # fmt: skip
    problems = {2: "bytes, but was written with", 3: "has changed", 4: "optimizer.safetensors", 5: "manifest.json is missing"}
    problems |= {6: "save_only_model", 7: "manifest.json is missing", 8: "another program", 9: "format 99"}
    problems |= {10: "a save that was interrupted", 11: "a deletion that was interrupted"}
    assert found[1].problem is None
    for step, text in problems.items():
        assert text in found[step].problem and str(found[step].path) in found[step].problem
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir()]
    assert found[1].nbytes == sum(sizes)
    assert names_in(tmp_path) == before


def test_nothing_to_find(tmp_path):
    assert list_checkpoints(tmp_path) == list_checkpoints(tmp_path / "nowhere") == []
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_the_newest_complete_one_and_a_warning_for_each_that_is_skipped(tmp_path, caplog):
    one_of_each(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 9
    assert ".checkpoint-10.writing was left by a save that was interrupted" in lines[0]
    for step, line in zip(range(9, 1, -1), lines[1:], strict=True):
        assert f"checkpoint-{step} is skipped (" in line
    assert "(model only)" in lines[4] and "(corrupt)" in lines[-1] and "bytes, but was written with" in lines[-1]


def test_older_ones_give_no_warning(tmp_path, caplog):
    truncate(save(tmp_path, 1))
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not caplog.records


def test_one_of_unknown_status_is_used_where_the_caller_accepts_it(tmp_path, caplog):
    save(tmp_path, 1)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "pytorch_model.bin").write_bytes(b"weights")
    truncate(save(tmp_path, 4))
    assert newest_checkpoint(tmp_path, accept=lambda path: path.name == "checkpoint-2") == tmp_path / "checkpoint-2"
    assert len(caplog.records) == 2  # 4, which is corrupt, and 3


def test_an_interrupted_replacement_is_undone(tmp_path):
    path = save(tmp_path, 4)
    path.rename(tmp_path / ".checkpoint-4.replaced")
    assert statuses(tmp_path) == {4: "complete"}


def test_a_replacement_that_cannot_be_undone_is_a_warning(tmp_path, caplog, monkeypatch):
    save(tmp_path, 2)
    save(tmp_path, 4).rename(tmp_path / ".checkpoint-4.replaced")

    def failing(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.rename", failing)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert ".checkpoint-4.replaced" in caplog.text and "Read-only file system" in caplog.text


def test_files_with_such_names_are_none(tmp_path):
    """A program may well write a file checkpoint-5."""
    (tmp_path / "checkpoint-5").write_bytes(b"weights")
    save(tmp_path, 4)
    assert statuses(tmp_path) == {4: "complete"}


def test_a_directory_that_is_not_readable_is_not_corrupt():
    """In a process without root's rights."""
    program = """
        import os, sys
        from fts.loops.checkpoint_list import list_checkpoints

        if os.geteuid() == 0:
            os.setegid(65534)
            os.seteuid(65534)
        for found in list_checkpoints(sys.argv[1]):
            print(found.step, found.status, found.problem)
    """
    with tempfile.TemporaryDirectory() as directory:  # pytest's own can be entered by its user only
        root = Path(directory)
        for step in (1, 2, 3, 4):
            save(root, step)
        root.chmod(0o755)
        (root / "checkpoint-2").chmod(0)
        (root / "checkpoint-3" / "manifest.json").chmod(0)
        (root / "checkpoint-4" / "model.safetensors").chmod(0)
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), directory], capture_output=True, text=True, check=False
        )
        (root / "checkpoint-2").chmod(0o755)
    lines = run.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["1", "complete"], ["2", "unknown"], ["3", "unknown"], ["4", "unknown"]], (
        run.stderr
    )
    assert all("Permission denied" in line for line in lines[1:])


def test_progress_is_reported(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    reported = []
    list_checkpoints(tmp_path, lambda done, count: reported.append((done, count)))
    assert reported == [(0, 3), (1, 3), (2, 3)]


def test_the_metrics_of_a_run(tmp_path):
    first = {"step": 5, "epoch": 1, "eval_loss": 0.5, "eval_runtime": 2.0, "eval_samples_per_second": 9.0}
    second = {"step": 10, "epoch": 2, "eval_loss": 0.75, "eval_f1": 1}
    save(tmp_path, 5, [{"step": 5, "loss": 3.0}, first], best_global_step=5, best_model_checkpoint="elsewhere/checkpoint-5")
    save(tmp_path, 10, [first, second], best_global_step=5, best_model_checkpoint="elsewhere/checkpoint-5")
    found = list_checkpoints(tmp_path)
    assert [dict(one.metrics) for one in found] == [{"eval_loss": 0.5}, {"eval_loss": 0.75, "eval_f1": 1.0}]
    assert best_checkpoint_step(found) == 5
    shutil.rmtree(tmp_path / "checkpoint-5")
    assert best_checkpoint_step(list_checkpoints(tmp_path)) is None


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"log_history": 3, "best_global_step": "x"}', '{"log_history": [3, {"step": 5}]}', "[" * 100_000]
)
def test_metrics_that_cannot_be_read_are_left_out(tmp_path, text):
    path = save(tmp_path, 5)
    (path / "trainer_state.json").write_text(text)  # not in the manifest
    [found] = list_checkpoints(tmp_path)
    assert (found.status, dict(found.metrics), found.best) == ("complete", {}, None)


NUMBERS = st.integers() | st.floats() | st.just(10**400) | st.booleans()
TEXTS = st.text(max_size=8) | st.integers(1, 5000).map(lambda digits: "checkpoint-" + "9" * digits)
JSON = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.lists(st.fixed_dictionaries({"step": st.just(5), "eval_loss": JSON, "eval_f1": NUMBERS}), max_size=2)
TOLD = JSON | st.fixed_dictionaries({"log_history": JSON | ENTRIES, "best_global_step": JSON, "best_model_checkpoint": JSON})
FILES = st.dictionaries(st.text(max_size=8) | st.sampled_from(["../../etc/passwd", "a\0b"]), JSON, max_size=3)
MANIFESTS = JSON | st.fixed_dictionaries({"format": JSON | st.just(1), "files": JSON | FILES})
BYTES = st.binary(max_size=40)


def as_bytes(documents):
    return BYTES | documents.map(lambda document: json.dumps(document).encode())


@given(as_bytes(MANIFESTS), as_bytes(TOLD))
def test_any_manifest_and_trainer_state_have_a_status(manifest, reported):
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root, "checkpoint-5")
        directory.mkdir()
        (directory / "progress.json").write_text("{}")
        (directory / "manifest.json").write_bytes(manifest)
        (directory / "trainer_state.json").write_bytes(reported)
        [found] = list_checkpoints(root)
        assert found.status in ("corrupt", "unknown") and found.problem
        assert all(isinstance(value, float) for value in found.metrics.values())
        assert looks_complete(directory) in (True, False)
        assert newest_checkpoint(root) is None
        assert best_checkpoint_step([found]) in (None, 5)


@pytest.mark.parametrize("name", ["checkpoint-009", "checkpoint-0000009", "checkpoint-\u0669"])
def test_a_copy_under_a_name_that_is_not_written_so_does_not_stand_for_the_checkpoint(tmp_path, name):
    path = save(tmp_path, 9)
    shutil.copytree(path, tmp_path / name)
    truncate(tmp_path / name)
    assert newest_checkpoint(tmp_path) == path
    assert [one.path for one in list_checkpoints(tmp_path)] == [path]


def test_all_leftovers_of_saves_and_deletions_of_a_step_are_listed(tmp_path):
    names = {
        ".checkpoint-4.writing",
        ".checkpoint-4.0a1b2c3d.writing",
        ".checkpoint-4.44445555.writing",
        ".checkpoint-4.0a.deleting",
    }
    for name in names:
        (tmp_path / name).mkdir()
    assert {one.path.name for one in list_checkpoints(tmp_path) if one.status == "interrupted"} == names
