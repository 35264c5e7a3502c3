"""Runs of several processes in which one is killed: the errors of the others, and the restart."""

import json
from pathlib import Path

from fts.loops.checkpoint_list import list_checkpoints
from tests.torchrun import results

SCRIPT = Path(__file__).parent / "run_two_processes.py"


def test_a_run_whose_process_is_killed_in_a_step_and_in_saves_has_the_result_of_one_that_was_not(tmp_path):
    folders = {name: tmp_path / name for name in ("killed", "uninterrupted")}
    for folder in folders.values():
        folder.mkdir()
    killed = results(SCRIPT, folders["killed"], tmp_path / "out", "dies", launcher=("--max-restarts", "3"))
    uninterrupted = results(SCRIPT, folders["uninterrupted"], tmp_path / "other", "lives")
    assert killed[0] == killed[1]
    assert killed[0]["weights"] == uninterrupted[0]["weights"]
    assert [(one.step, one.status) for one in list_checkpoints(tmp_path / "out") if one.status != "interrupted"] == [
        (step, "complete") for step in (4, 8, 12)
    ]
    for attempt, survivor in ((0, 0), (1, 0), (2, 1)):
        error = json.loads((folders["killed"] / f"attempt-{attempt}-{survivor}").read_text())
        assert error["type"] == "DistributedError" and "resume_from_checkpoint=True" in error["text"], error
        assert error["seconds"] < 60
