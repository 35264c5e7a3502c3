"""`fts checkpoints`: list and verify the checkpoints of a directory, and delete those that are not needed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fts.errors import ArgumentError
from fts.loops.checkpoint_list import CheckpointInfo, best_checkpoint_step, list_checkpoints, newest_checkpoint_step
from fts.loops.retention import CheckpointScore, select_to_keep
from fts.storage.atomic import delete_atomically

PROGRESS_DELAY = 2.0
"""Progress is printed after so many seconds."""

STALE_AFTER = 600.0
"""An interrupted save that was not written to for so many seconds belongs to no running process."""


def add_to(commands: Any) -> None:
    """Add the commands to a parser's."""
    listing = commands.add_parser(
        "checkpoints",
        help="list the checkpoints of a directory and verify them",
        description="List the checkpoints of a directory, and verify every file by its checksum. The exit status is 1 if any is "
        "corrupt. `fts checkpoints prune DIR` deletes those that are not needed.",
    )
    listing.add_argument("directory", type=Path, metavar="DIR", help="the directory with the checkpoint-N directories")
    listing.set_defaults(run=show)

    pruning = commands.add_parser(
        "checkpoints prune",
        help="delete the checkpoints that are not needed",
        description="Delete all checkpoints but the newest ones, as save_total_limit does, and those that are corrupt, and what "
        "interrupted saves left. The newest complete one and the best one are kept. Not for a directory that a run writes to.",
    )
    pruning.add_argument("directory", type=Path, metavar="DIR", help="the directory with the checkpoint-N directories")
    pruning.add_argument("--keep", type=int, required=True, metavar="N", help="how many to keep, including the best one")
    pruning.add_argument(
        "--keep-best",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the best one, where trainer_state.json names it (the default)",
    )
    pruning.add_argument("--dry-run", action="store_true", help="print what would be deleted, and delete nothing")
    pruning.set_defaults(run=prune)


def show(options: argparse.Namespace) -> int:
    """List and verify; 1 if one is corrupt."""
    found = list_with_progress(options.directory)
    if not found:
        print(f"No checkpoints in {options.directory}.")
        return 0
    best, newest = best_checkpoint_step(found), newest_checkpoint_step(found)
    rows = [("step", "written", "size", "state", "evaluation"), *(_row(one, best, newest) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row, one in zip(rows, [None, *found], strict=True):
        step, written, size, state, metrics = row
        line = f"{step:>{widths[0]}}  {written:{widths[1]}}  {size:>{widths[2]}}  {state:{widths[3]}}  {metrics}"
        print(line.rstrip())
        if one is not None and one.problem is not None:
            print(f"{'':{widths[0]}}  {one.problem}")
    return int(any(one.status == "corrupt" for one in found))


def prune(options: argparse.Namespace) -> int:
    """Delete what is not needed; 1 if something could not be deleted."""
    if options.keep < 1:
        raise ArgumentError(f"--keep {options.keep}: at least one checkpoint is kept. Give a number of at least 1.")
    found = list_with_progress(options.directory)
    deleted, kept = choose_to_delete(found, options.keep, keep_best=options.keep_best, now=time.time())
    for one, reason in kept:
        print(f"kept     {one.path.name}: {reason}")
    failed = False
    for one, reason in deleted:
        try:
            if not options.dry_run:
                delete_atomically(one.path)
        except OSError as error:
            failed = True
            print(f"fts: {one.path} could not be deleted: {error}", file=sys.stderr)
            continue
        print(f"{'would delete' if options.dry_run else 'deleted '} {one.path.name} ({_bytes(one.nbytes)}): {reason}")
    freed = _bytes(sum(one.nbytes for one, _ in deleted))
    if not deleted:
        print("There is nothing to delete.")
    elif options.dry_run:
        print(f"{len(deleted)} would be deleted, {freed}.")
    return int(failed)


def choose_to_delete(
    found: list[CheckpointInfo], keep: int, *, keep_best: bool, now: float
) -> tuple[list[tuple[CheckpointInfo, str]], list[tuple[CheckpointInfo, str]]]:
    """Which checkpoints to delete and which to keep, each with the reason.

    Args:
        found: the result of `list_checkpoints`.
        keep: how many valid ones to keep.
        keep_best: keep the best one.
        now: the time, in seconds since 1970.

    >>> from fts.loops.checkpoint_list import CheckpointInfo
    >>> found = [CheckpointInfo(step, Path(f"checkpoint-{step}"), "complete") for step in (1, 2, 3)]
    >>> [(one.step, reason) for one, reason in choose_to_delete(found, 2, keep_best=True, now=0.0)[0]]
    [(1, 'older than those that are kept')]
    """
    valid = [one for one in found if one.status in ("complete", "model only")]
    best, newest = best_checkpoint_step(found) if keep_best else None, newest_checkpoint_step(found)
    steps = select_to_keep([CheckpointScore(one.step) for one in valid], keep, best=best) | ({newest} - {None})
    deleted: list[tuple[CheckpointInfo, str]] = []
    kept: list[tuple[CheckpointInfo, str]] = []
    for one in found:
        if one in valid and one.step in steps:
            pins = [name for name, step in (("the newest", newest), ("the best", best)) if one.step == step]
            kept.append((one, " and ".join(pins) or one.status))
        elif one in valid:
            deleted.append((one, "older than those that are kept"))
        elif one.status == "unknown":
            kept.append((one, f"its status is unknown. {one.problem}"))
        elif one.status == "interrupted":
            if now - _last_written(one) < STALE_AFTER:
                kept.append((one, "it was written to in the last ten minutes: a save may be in progress."))
            else:
                deleted.append((one, "left by a save or deletion that was interrupted"))
        elif not valid:
            kept.append((one, f"corrupt, but none is complete, so its other files may be useful. {one.problem}"))
        else:
            deleted.append((one, f"corrupt: {one.problem}"))
    return deleted, kept


def list_with_progress(directory: Path) -> list[CheckpointInfo]:
    """`list_checkpoints`, with progress on standard error if it takes long.

    Raises:
        ArgumentError: there is no such directory.
    """
    if not directory.is_dir():
        raise ArgumentError(f"There is no directory {directory}. Give the output directory of a run.")
    return list_checkpoints(directory, _progress())


def _progress() -> Callable[[int, int], None]:
    start = time.monotonic()

    def report(done: int, count: int) -> None:
        if time.monotonic() - start >= PROGRESS_DELAY:
            print(f"verified {done} of {count} checkpoints ...", file=sys.stderr)

    return report


def _row(one: CheckpointInfo, best: int | None, newest: int | None) -> tuple[str, str, str, str, str]:
    marks = (
        [] if one.status == "interrupted" else [name for name, step in (("newest", newest), ("best", best)) if one.step == step]
    )
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.written))
    metrics = "  ".join(f"{name.removeprefix('eval_')} {value:.6g}" for name, value in one.metrics.items())
    return str(one.step), written, _bytes(one.nbytes), ", ".join([one.status, *marks]), metrics


def _last_written(one: CheckpointInfo) -> float:
    times = [one.written]
    for path in one.path.rglob("*"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # it was deleted meanwhile, so a process is active
            return time.time()
    return max(times)


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
