"""`fts checkpoints`: what is there, what is wrong with it, and deleting what is not needed; `fts consolidate`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fts.errors import ArgumentError
from fts.loops.checkpoint_list import CheckpointInfo, best_checkpoint_step, list_checkpoints, newest_checkpoint_step
from fts.loops.consolidation import consolidate_checkpoint
from fts.loops.retention import CheckpointScore, select_to_keep
from fts.storage.atomic import delete_atomically

QUIET = 2.0
"""Verifying says nothing of its progress for so many seconds."""

STILL = 600.0
"""What is left of a save, and was not written to for so many seconds, is of no run that is alive."""


def add_to(commands: Any) -> None:
    """Add the commands to a parser's."""
    listing = commands.add_parser(
        "checkpoints",
        help="list the checkpoints of a directory and verify them",
        description="List the checkpoints of a directory, and verify every file by its checksum. The exit status is 1 if any is "
        "damaged. `fts checkpoints prune DIR` deletes those that are not needed.",
    )
    listing.add_argument("directory", type=Path, metavar="DIR", help="the directory with the checkpoint-N directories")
    listing.set_defaults(run=show)

    pruning = commands.add_parser(
        "checkpoints prune",
        help="delete the checkpoints that are not needed",
        description="Delete all checkpoints but the newest ones, as save_total_limit does, and those that are damaged, and what "
        "interrupted saves left. The newest whole one and the best one stay. Not for a directory that a run is writing to.",
    )
    pruning.add_argument("directory", type=Path, metavar="DIR", help="the directory with the checkpoint-N directories")
    pruning.add_argument("--keep", type=int, required=True, metavar="N", help="how many stay, the best one among them")
    pruning.add_argument(
        "--keep-best",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the best one, where trainer_state.json tells which it is (the default)",
    )
    pruning.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    pruning.set_defaults(run=prune)

    consolidating = commands.add_parser(
        "consolidate",
        help="make a model for from_pretrained of a sharded checkpoint",
        description="Put the model of a checkpoint that several processes wrote in parts (FSDP, sharded state dict) together, so "
        "that from_pretrained reads it. It needs little memory, and no process group.",
    )
    consolidating.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint-N directory")
    consolidating.add_argument("directory", type=Path, metavar="OUT", help="where the model shall be")
    consolidating.set_defaults(run=consolidate)


def show(options: argparse.Namespace) -> int:
    """List and verify; 1 if one is damaged."""
    found = surveyed(options.directory)
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
    return int(any(one.status == "damaged" for one in found))


def prune(options: argparse.Namespace) -> int:
    """Delete what is not needed; 1 if something could not be deleted."""
    if options.keep < 1:
        raise ArgumentError(f"--keep {options.keep}: at least one checkpoint stays. Give a number of at least 1.")
    found = surveyed(options.directory)
    doomed, spared = choose(found, options.keep, keep_best=options.keep_best, now=time.time())
    for one, reason in spared:
        print(f"kept     {one.path.name}: {reason}")
    failed = False
    for one, reason in doomed:
        try:
            if not options.dry_run:
                delete_atomically(one.path)
        except OSError as error:
            failed = True
            print(f"fts: {one.path} could not be deleted: {error}", file=sys.stderr)
            continue
        print(f"{'would delete' if options.dry_run else 'deleted '} {one.path.name} ({_bytes(one.nbytes)}): {reason}")
    freed = _bytes(sum(one.nbytes for one, _ in doomed))
    if not doomed:
        print("Nothing is to be deleted.")
    elif options.dry_run:
        print(f"{len(doomed)} would be deleted, {freed}.")
    return int(failed)


def consolidate(options: argparse.Namespace) -> int:
    """Put the parts of a model together."""
    if options.directory.exists() and any(options.directory.iterdir()):
        raise ArgumentError(f"{options.directory} is not empty. Give a directory that is not there yet.")
    path = consolidate_checkpoint(options.checkpoint, options.directory)
    print(f"{path} has the model of {options.checkpoint}.")
    return 0


def choose(
    found: list[CheckpointInfo], keep: int, *, keep_best: bool, now: float
) -> tuple[list[tuple[CheckpointInfo, str]], list[tuple[CheckpointInfo, str]]]:
    """What is deleted and what is kept, each with the reason.

    Args:
        found: what `list_checkpoints` found.
        keep: how many intact ones stay.
        keep_best: the best one stays.
        now: the time, in seconds since 1970.

    >>> from fts.loops.checkpoint_list import CheckpointInfo
    >>> found = [CheckpointInfo(step, Path(f"checkpoint-{step}"), "whole") for step in (1, 2, 3)]
    >>> [(one.step, reason) for one, reason in make_optimizer(found, 2, keep_best=True, now=0.0)[0]]
    [(1, 'older than what is kept')]
    """
    intact = [one for one in found if one.status in ("whole", "model only")]
    best, newest = best_checkpoint_step(found) if keep_best else None, newest_checkpoint_step(found)
    stay = select_to_keep([CheckpointScore(one.step) for one in intact], keep, best=best) | ({newest} - {None})
    doomed: list[tuple[CheckpointInfo, str]] = []
    spared: list[tuple[CheckpointInfo, str]] = []
    for one in found:
        if one in intact and one.step in stay:
            pins = [name for name, step in (("the newest", newest), ("the best", best)) if one.step == step]
            spared.append((one, " and ".join(pins) or one.status))
        elif one in intact:
            doomed.append((one, "older than what is kept"))
        elif one.status == "unknown":
            spared.append((one, f"it cannot be judged. {one.problem}"))
        elif one.status == "cut off":
            if now - _last_written(one) < STILL:
                spared.append((one, "it was written to in the last ten minutes: perhaps a save is under way."))
            else:
                doomed.append((one, "left of a save or deletion that was cut off"))
        elif not intact:
            spared.append((one, f"damaged, but none is whole, so something in it may be of use. {one.problem}"))
        else:
            doomed.append((one, f"damaged: {one.problem}"))
    return doomed, spared


def surveyed(directory: Path) -> list[CheckpointInfo]:
    """As `list_checkpoints`; its progress goes to standard error, if it takes long.

    Raises:
        ArgumentError: there is no such directory.
    """
    if not directory.is_dir():
        raise ArgumentError(f"There is no directory {directory}. Give the output directory of a run.")
    return list_checkpoints(directory, _progress())


def _progress() -> Callable[[int, int], None]:
    start = time.monotonic()

    def say(done: int, count: int) -> None:
        if time.monotonic() - start >= QUIET:
            print(f"verified {done} of {count} checkpoints ...", file=sys.stderr)

    return say


def _row(one: CheckpointInfo, best: int | None, newest: int | None) -> tuple[str, str, str, str, str]:
    marks = (
        [] if one.status == "cut off" else [name for name, step in (("newest", newest), ("best", best)) if one.step == step]
    )
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.written))
    metrics = "  ".join(f"{name.removeprefix('eval_')} {value:.6g}" for name, value in one.metrics.items())
    return str(one.step), written, _bytes(one.nbytes), ", ".join([one.status, *marks]), metrics


def _last_written(one: CheckpointInfo) -> float:
    times = [one.written]
    for path in one.path.rglob("*"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # it was deleted meanwhile, so somebody is at work
            return time.time()
    return max(times)


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
