"""Which checkpoints stay, as a pure function, and on the disk."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import attrs
import pytest
from hypothesis import given, strategies as st

from fts.errors import ArgumentError
from fts.loops import atomic_directory, newest_checkpoint, rotate_checkpoints
from fts.loops.retention import CheckpointScore, select_to_keep
from fts.storage.atomic import delete_atomically
from tests.loops.checkpoint_files import names_in, save, save_model, truncate

LIMITS = st.none() | st.integers(1, 8)
CHECKPOINTS = st.lists(
    st.builds(CheckpointScore, st.integers(1, 60), st.none() | st.floats(allow_infinity=False), st.booleans()),
    unique_by=lambda one: one.step,
    max_size=12,
)


def best_by(checkpoints, greater):
    """The best complete one, found by sorting (the function does it in one pass)."""
    rated = [one for one in checkpoints if one.complete and one.metric is not None and one.metric == one.metric]
    rated.sort(key=lambda one: one.step)
    values = [one.metric for one in rated]
    return rated[values.index(max(values) if greater else min(values))].step if rated else None


@given(CHECKPOINTS, LIMITS, st.booleans())
def test_the_newest_and_the_best_are_kept_and_never_more_than_the_limit(checkpoints, limit, greater):
    stay = select_to_keep(checkpoints, limit, greater_is_better=greater)
    complete = {one.step for one in checkpoints if one.complete}
    assert stay <= complete  # nothing corrupt, and nothing that does not exist
    if limit is None:
        assert stay == complete
        return
    best = best_by(checkpoints, greater)
    pinned = {max(complete), best} - {None} if complete else set()
    assert pinned <= stay
    assert len(stay) == min(len(complete), max(limit, len(pinned)))
    assert len(stay) <= max(limit, 2)
    others = stay - pinned
    assert all(step > gone for step in others for gone in complete - stay)  # the newest of the rest


@given(CHECKPOINTS, st.integers(1, 8), st.booleans())
def test_a_corrupt_checkpoint_does_not_count_towards_the_limit(checkpoints, limit, greater):
    complete = [one for one in checkpoints if one.complete]
    assert select_to_keep(checkpoints, limit, greater_is_better=greater) == select_to_keep(
        complete, limit, greater_is_better=greater
    )


@given(CHECKPOINTS, st.integers(1, 8), st.none() | st.integers(1, 60))
def test_more_room_keeps_what_less_room_keeps_and_nothing_comes_back(checkpoints, limit, best):
    stay = select_to_keep(checkpoints, limit, best=best)
    assert stay <= select_to_keep(checkpoints, limit + 1, best=best)
    left = [one for one in checkpoints if one.step in stay]
    assert select_to_keep(left, limit, best=best) == stay  # nothing more goes when nothing was saved
    later = CheckpointScore(61)
    assert select_to_keep([*left, later], limit, best=best) == select_to_keep(
        [*checkpoints, later], limit, best=best
    )  # a history forgotten


@given(st.permutations([CheckpointScore(step, metric=step % 3) for step in range(1, 8)]), st.integers(1, 8))
def test_the_order_of_the_list_does_not_matter(checkpoints, limit):
    ordered = sorted(checkpoints, key=lambda one: one.step)
    assert select_to_keep(checkpoints, limit, greater_is_better=True) == select_to_keep(ordered, limit, greater_is_better=True)


def test_the_meaning_of_save_total_limit():
    """As in the documentation of transformers: with 5, the four last and the best; with 1, the last and the best."""
    steps = [CheckpointScore(step) for step in range(100, 1100, 100)]
    assert select_to_keep(steps, 5, best=200) == {200, 700, 800, 900, 1000}
    assert select_to_keep(steps, 5, best=900) == {600, 700, 800, 900, 1000}
    assert select_to_keep(steps, 1, best=300) == {300, 1000}
    assert select_to_keep(steps, 1, best=1000) == select_to_keep(steps, 1) == {1000}


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_other_limits_are_errors(limit):
    with pytest.raises(ArgumentError, match="at least 1"):
        select_to_keep([], limit)


def test_two_definitions_of_the_best_are_an_error():
    with pytest.raises(ArgumentError, match="best=3"):
        select_to_keep([], 2, best=3, greater_is_better=True)


def test_rotation_deletes_the_oldest_and_keeps_the_best(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-final").mkdir()
    rotate_checkpoints(tmp_path, 2, best=tmp_path / "checkpoint-5")
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-100", "checkpoint-final"}


def test_the_best_is_known_by_its_name_where_the_run_was_moved(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, 2, best="/where/it/was/before/checkpoint-5")
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-100"}
    rotate_checkpoints(tmp_path, 1, best=5)
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-100"}


def test_a_corrupt_newest_checkpoint_does_not_displace_the_complete_one(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    truncate(tmp_path / "checkpoint-20")
    truncate(tmp_path / "checkpoint-5")
    rotate_checkpoints(tmp_path, 1)
    # 20 is for the user to look at, until it is older than all that stay
    assert names_in(tmp_path) == {"checkpoint-15", "checkpoint-20"}
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-15"
    save(tmp_path, 25)
    rotate_checkpoints(tmp_path, 1)
    assert names_in(tmp_path) == {"checkpoint-25"}


def test_the_checkpoint_just_written_is_kept_where_another_run_left_later_ones(tmp_path):
    for step in (10, 90, 100):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, 1, latest=tmp_path / "checkpoint-10")
    assert names_in(tmp_path) == {"checkpoint-10", "checkpoint-100"}


def test_without_a_limit_nothing_is_deleted(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    truncate(tmp_path / "checkpoint-5")
    rotate_checkpoints(tmp_path, None)
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-10"}


def test_a_checkpoint_of_another_program_counts_as_one(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"weights")
    for step in (10, 15):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, 3)
    assert names_in(tmp_path) == {"checkpoint-5", "checkpoint-10", "checkpoint-15"}
    rotate_checkpoints(tmp_path, 2)
    assert names_in(tmp_path) == {"checkpoint-10", "checkpoint-15"}


DELETED_HALF = """
    import os, signal, sys
    from pathlib import Path
    from fts.loops import rotate_checkpoints

    class Fatal:
        count = 0

    unlink = os.unlink

    def killed(*args, **kwargs):
        Fatal.count += 1
        if Fatal.count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(*args, **kwargs)

    os.unlink = killed
    rotate_checkpoints(Path(sys.argv[1]), 1)
"""


def test_a_deletion_that_is_killed_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    files = {path.name for path in (tmp_path / "checkpoint-5").iterdir()}
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(DELETED_HALF), str(tmp_path)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert names_in(tmp_path) == {".checkpoint-5.deleting", "checkpoint-10"}
    left = {path.name for path in (tmp_path / ".checkpoint-5.deleting").iterdir()}
    assert left and left < files
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    rotate_checkpoints(tmp_path, 1)
    assert names_in(tmp_path) == {"checkpoint-10"}


def test_a_step_that_is_saved_and_deleted_again_replaces_its_leftovers(tmp_path):
    save(tmp_path, 5)
    os.rename(tmp_path / "checkpoint-5", tmp_path / ".checkpoint-5.deleting")
    save(tmp_path, 5)
    delete_atomically(tmp_path / "checkpoint-5")
    assert names_in(tmp_path) == set()


def test_a_link_is_deleted_and_not_what_it_leads_to(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", 5)
    root = tmp_path / "root"
    save(root, 10)
    (root / "checkpoint-5").symlink_to(elsewhere)
    rotate_checkpoints(root, 1)
    assert names_in(root) == {"checkpoint-10"}
    assert (elsewhere / "manifest.json").is_file()


FORBIDDEN = """
    import logging, os, sys
    from fts.loops import rotate_checkpoints

    logging.basicConfig(format="%(levelname)s %(message)s")
    if os.geteuid() == 0:  # root may delete anything
        os.setegid(65534)
        os.seteuid(65534)
    rotate_checkpoints(sys.argv[1], 1)
    print("trained on")
"""


def test_a_deletion_that_is_not_permitted_is_a_warning():
    with tempfile.TemporaryDirectory() as directory:  # pytest's own can be entered by its user only
        root = Path(directory)
        for step in (5, 10):
            save(root, step)
        for path in (*root.rglob("*"), root):
            path.chmod(0o555)
        try:
            program = [sys.executable, "-c", textwrap.dedent(FORBIDDEN), directory]
            run = subprocess.run(program, capture_output=True, text=True, check=False)
            assert run.stdout == "trained on\n", run.stderr
            assert "WARNING" in run.stderr and "checkpoint-5 is outdated, but could not be deleted" in run.stderr
            assert "Permission denied" in run.stderr
            assert names_in(root) == {"checkpoint-5", "checkpoint-10"}
        finally:
            for path in (root, *root.rglob("*")):
                path.chmod(0o755)


def test_a_deletion_that_fails_in_the_middle_is_a_warning_and_is_tried_again(tmp_path, monkeypatch, caplog):
    for step in (5, 10):
        save(tmp_path, step)
    remove = os.rmdir

    def failing(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rmdir", failing)
    with caplog.at_level(logging.WARNING):
        rotate_checkpoints(tmp_path, 1)
    assert "Input/output error" in caplog.text and "checkpoint-5" in caplog.text
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    monkeypatch.setattr(os, "rmdir", remove)
    rotate_checkpoints(tmp_path, 1)
    assert names_in(tmp_path) == {"checkpoint-10"}


def test_sealed_models_are_rotated_as_well(tmp_path):
    for step in (1, 2, 3):
        atomic_directory(
            tmp_path / f"checkpoint-{step}", lambda hidden: (hidden / "model.safetensors").write_bytes(b"w") and None
        )
    rotate_checkpoints(tmp_path, 2)
    assert names_in(tmp_path) == {"checkpoint-2", "checkpoint-3"}


def test_the_newest_resumable_one_is_kept_with_later_models_alone(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    for step in (3, 4):
        save_model(tmp_path, step)
        rotate_checkpoints(tmp_path, 1)
        assert names_in(tmp_path) == {"checkpoint-2", f"checkpoint-{step}"}
    save_model(tmp_path, 5)
    rotate_checkpoints(tmp_path, 3)
    assert names_in(tmp_path) == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    save(tmp_path, 6)
    rotate_checkpoints(tmp_path, 1)
    assert names_in(tmp_path) == {"checkpoint-6"}


@given(CHECKPOINTS, st.integers(1, 8), st.sets(st.integers(1, 60)))
def test_a_run_can_always_resume_from_the_kept_checkpoints(checkpoints, limit, alone):
    rated = [attrs.evolve(one, resumable=one.step not in alone) for one in checkpoints]
    usable = [one.step for one in rated if one.complete and one.resumable]
    stay = select_to_keep(rated, limit)
    assert not usable or max(usable) in stay
    assert len(stay) <= max(limit, 2)
