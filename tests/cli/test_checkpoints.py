"""`fts checkpoints` and `fts checkpoints prune`, as a user calls them."""

import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from fts.cli import main
from fts.loops import newest_checkpoint
from tests.loops.checkpoint_files import flip_a_bit, names_in, save, save_model, truncate


def evaluated(step, loss):
    return {"step": step, "eval_loss": loss, "eval_runtime": 3.0}


def a_run(root):
    """Checkpoints 5, 10, 15 and 20, of which 10 is the best."""
    history = []
    for step, loss in ((5, 0.9), (10, 0.25), (15, 0.5), (20, 0.75)):
        history.append(evaluated(step, loss))
        best = min(history, key=lambda entry: entry["eval_loss"])["step"]
        save(root, step, history, best_global_step=best, best_model_checkpoint=f"{root}/checkpoint-{best}")


def make_old(path):
    for each in (*path.rglob("*"), path):
        os.utime(each, (0, time.time() - 3600))


def test_a_listing(tmp_path, capsys):
    a_run(tmp_path)
    assert main(["checkpoints", str(tmp_path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "written", "size", "state", "evaluation"]
    today = time.strftime("%Y-%m-%d")
    assert [re.split(" {2,}", line.strip())[0] for line in lines] == ["5", "10", "15", "20"]
    assert all(today in line and "KiB" in line for line in lines)
    assert [line[line.index("complete") :] for line in lines] == [
        "complete          loss 0.9", "complete, best    loss 0.25", "complete          loss 0.5", "complete, newest  loss 0.75",
    ]  # fmt: skip


def test_corruption_is_named_and_the_exit_status_is_1(tmp_path, capsys):
    a_run(tmp_path)
    save_model(tmp_path, 25)
    assert main(["checkpoints", str(tmp_path)]) == 0  # a model alone is not corrupt
    flip_a_bit(tmp_path / "checkpoint-20")
    capsys.readouterr()
    assert main(["checkpoints", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"20 .* corrupt  +loss 0.75\n +\S*/checkpoint-20/model.safetensors has changed since it was written", out)
    assert re.search(r"15 .* complete, newest", out)
    assert re.search(r"25 .* model only\n .*save_only_model", out)


def test_no_checkpoints(tmp_path, capsys):
    assert main(["checkpoints", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No checkpoints in {tmp_path}.\n"
    assert main(["checkpoints", str(tmp_path / "nowhere")]) == 2
    assert "There is no directory" in capsys.readouterr().err


def test_progress_goes_to_standard_error_once_it_takes_long(tmp_path, capsys, monkeypatch):
    a_run(tmp_path)
    monkeypatch.setattr("fts.cli.checkpoints.PROGRESS_DELAY", 0.0)
    main(["checkpoints", str(tmp_path)])
    shown = capsys.readouterr()
    assert "verified 3 of 4 checkpoints" in shown.err and "verified" not in shown.out


def test_pruning_keeps_the_newest_and_the_best(tmp_path, capsys):
    a_run(tmp_path)
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert names_in(tmp_path) == {"checkpoint-10", "checkpoint-20"}
    out = capsys.readouterr().out
    assert "deleted  checkpoint-5 (" in out and "deleted  checkpoint-15 (" in out
    assert "kept     checkpoint-10: the best" in out and "kept     checkpoint-20: the newest" in out


def test_pruning_without_the_best(tmp_path):
    a_run(tmp_path)
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "2", "--no-keep-best"]) == 0
    assert names_in(tmp_path) == {"checkpoint-15", "checkpoint-20"}


def test_a_dry_run_prints_the_same_and_deletes_nothing(tmp_path, capsys):
    a_run(tmp_path)
    before = names_in(tmp_path)
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert names_in(tmp_path) == before
    assert "would delete checkpoint-5 " in out and "would delete checkpoint-15 " in out
    assert re.search(r"^2 would be deleted, \d.* KiB\.$", out, re.MULTILINE)


def test_corrupt_ones_and_leftovers_are_deleted_with_a_reason(tmp_path, capsys):
    a_run(tmp_path)
    truncate(tmp_path / "checkpoint-20")
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / ".checkpoint-25.writing")
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / ".checkpoint-1.deleting")
    for left in (".checkpoint-25.writing", ".checkpoint-1.deleting"):
        make_old(tmp_path / left)
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "9"]) == 0
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-10", "checkpoint-15"}
    out = capsys.readouterr().out
    assert re.search(r"deleted  checkpoint-20 .*: corrupt: .* bytes, but was written with", out)
    assert out.count("left by a save or deletion that was interrupted") == 2
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-15"


def test_a_save_that_may_be_in_progress_is_left_alone(tmp_path, capsys):
    a_run(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / ".checkpoint-25.writing")
    make_old(tmp_path / ".checkpoint-25.writing")
    os.utime(tmp_path / ".checkpoint-25.writing" / "model.safetensors")
    main(["checkpoints", "prune", str(tmp_path), "--keep", "9"])
    assert ".checkpoint-25.writing" in names_in(tmp_path)
    assert "a save may be in progress" in capsys.readouterr().out


def test_the_newest_complete_one_is_kept_where_later_ones_are_models_alone(tmp_path):
    save(tmp_path, 5)
    for step in (10, 15):
        save_model(tmp_path, step)
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-15"}


def test_checkpoints_of_unknown_status_are_left_alone(tmp_path, capsys):
    save(tmp_path, 5)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "pytorch_model.bin").write_bytes(b"weights")
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert names_in(tmp_path) == {"checkpoint-1", "checkpoint-5"}
    assert "another program wrote it" in capsys.readouterr().out


def test_where_all_are_corrupt_nothing_is_deleted(tmp_path, capsys):
    for step in (5, 10):
        truncate(save(tmp_path, step))
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-10"}
    assert "none is complete" in capsys.readouterr().out


def test_a_deletion_that_fails_is_reported_and_the_rest_is_deleted(tmp_path, capsys, monkeypatch):
    a_run(tmp_path)
    rename = os.rename

    def failing(source, target):
        if str(source).endswith("checkpoint-5"):
            raise PermissionError(13, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "1"]) == 1
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-10", "checkpoint-20"}
    assert "checkpoint-5 could not be deleted: [Errno 13]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "COMMAND"),
        (["checkpoints"], "DIR"),
        (["checkpoints", "prune", "."], "--keep"),
        (["checkpoints", "prune", ".", "--keep", "two"], "invalid int value"),
        (["checkpoints", "prune", ".", "--keep", "0"], "at least one checkpoint is kept"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_invalid_arguments(words, text, capsys):
    assert main(words) == 2
    assert text in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "checkpoints" in out and "checkpoints prune" in out


def test_as_a_module_in_a_process_of_its_own(tmp_path):
    a_run(tmp_path)
    flip_a_bit(tmp_path / "checkpoint-15")
    run = subprocess.run(
        [sys.executable, "-m", "fts.cli", "checkpoints", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stderr
    assert "checkpoint-15/model.safetensors has changed" in run.stdout


def test_the_command_that_is_installed_is_this_one():
    scripts = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(scripts["fts"]) is main


def test_importing_fts_does_not_load_the_command_line():
    program = "import sys, fts, fts.loops; sys.exit(any(name.startswith('fts.cli') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
