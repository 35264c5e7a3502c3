"""Kills training processes at random instants, lets them resume, and compares the end with a run that was never killed.

    python -m tests.reliability.kills --kills 200 --seed 1

An attempt is a process that resumes from the directory of its run. It is killed (SIGKILL) at an instant drawn from
the seed: after some time, at one of its file operations, or some milliseconds after one. So kills land in steps, in saves,
between their renames, in deletions and in resumes. After each, the newest complete checkpoint must be one that existed before,
or a newer one, and the next attempt must resume from it. The attempt that reaches the end must have the bits of a run without
kills: weights, optimizer, position and logged metrics.

One process imports everything and forks each attempt, so that one costs a fraction of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import xxhash

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # no threads before a fork
OPERATIONS = {
    "any": (60, ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")),
    "rename": (5, ("os.rename",)),
    "delete": (20, ("os.remove", "os.rmdir")),
}
"""Kinds of file operations: up to which of them an attempt may come, and Python's audit events of them. Flushing opens a file."""


@attrs.frozen
class Kill:
    """When an attempt is killed.

    Attributes:
        seconds: after so long, counted from the first step; from the start if `early`; from a file operation if there is one.
        early: whether it may come before the first step.
        kind: at a file operation of this kind in the run's directory; with no `seconds` just before it is done.
        count: at so many of them.
    """

    seconds: float
    early: bool = False
    kind: str | None = None
    count: int = 0


def draw_kill(generator: random.Random) -> Kill:
    """A kill: of ten, four by the clock, one of them from the start, and six by file operations, two of them a little later."""
    choice = generator.random()
    if choice < 0.1:
        return Kill(generator.uniform(0, 0.1), early=True)
    if choice < 0.4:
        return Kill(generator.uniform(0, 0.6))
    kind = generator.choice([*OPERATIONS, "rename"])
    return Kill(0.0 if choice < 0.8 else generator.uniform(0, 0.03), kind=kind, count=generator.randint(1, OPERATIONS[kind][0]))


# An attempt


def run_attempt(loop: Callable[..., Any], root: Path, pipe: int, kill: Kill | None, ending: Path) -> None:
    """Run to the end and write the result to `ending`; called in a process of its own."""
    import torch
    from safetensors.torch import save_file

    def report(text: str) -> None:
        os.write(pipe, f"{text}\n".encode())

    torch.set_num_threads(1)
    if kill is not None and kill.kind is not None:
        _count_operations(root, kill, report)
    module, metrics = loop(root, report)
    shutil.rmtree(ending, ignore_errors=True)  # of an attempt that was killed at this point
    ending.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, ending / "weights.safetensors")
    (ending / "metrics.json").write_text(json.dumps(metrics, sort_keys=True))
    shutil.copytree(newest_complete(root), ending / "checkpoint")
    report("done")


def _count_operations(root: Path, kill: Kill, report: Callable[[str], None]) -> None:
    root_prefix, count, names = str(root) + os.sep, 0, OPERATIONS[kill.kind or "any"][1]

    def on_audit_event(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in names:
            return
        path = arguments[0]
        # files that are deleted with their directory have relative names
        relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if not relative and not (isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root_prefix)):
            return
        count += 1
        if count == kill.count:
            if kill.seconds == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            report("operation")

    sys.addaudithook(on_audit_event)


# Its end


def newest_complete(root: Path) -> Path:
    """The complete checkpoint of the highest step, by its manifest, which is read without fts; under any name.

    Raises:
        FileNotFoundError: there is none.
    """
    found = {step: path for path in listed(root) if (step := step_of(path)) and not path.name.endswith((".writing", ".deleting"))}
    if not found:
        raise FileNotFoundError(f"no complete checkpoint in {root}")
    return found[max(found)]


def listed(root: Path) -> list[Path]:
    """The entries of a run's directory, which may not exist yet."""
    return list(root.iterdir()) if root.is_dir() else []


def step_of(path: Path) -> int:
    """The step of a checkpoint; 0 if it is not complete."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        complete = all(xxhash.xxh3_128_hexdigest((path / name).read_bytes()) == files[name]["xxh3_128"] for name in files)
        return int(json.loads((path / "state.json").read_text())["step"]) if complete else 0
    except (OSError, ValueError):  # incomplete, or just being deleted
        return 0


def step_in(root: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max((step_of(path) for path in listed(root) if not path.name.endswith((".writing", ".deleting"))), default=0)


def phase_of(root: Path, began: bool) -> str:
    """What an attempt was doing when it was killed, by the files that it left."""
    if not began:
        return "starting"
    names = [path.name for path in listed(root)]
    if any(name.endswith(".replaced") and name[1 : -len(".replaced")] not in names for name in names):
        return "between two renames"
    if any(name.endswith(".writing") for name in names):
        return "writing"
    if any(name.endswith((".replaced", ".deleting")) for name in names):
        return "deleting"
    return "training"


@attrs.define
class Attempt:
    """What a process reported, and how it ended."""

    began: int | None = None
    saved: int = 0
    before: int = 0
    done: bool = False
    status: int = 0
    errors: str = ""


def fork_attempt(loop: Callable[..., Any], root: Path, kill: Kill | None, ending: Path) -> Attempt:
    """Fork an attempt, kill it at its time, and return what it reported."""
    reading, writing = os.pipe()
    errors = root.with_suffix(".err")
    errors.write_bytes(b"")  # also where an attempt is killed before it has opened the file
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with errors.open("w") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            run_attempt(loop, root, writing, kill, ending)
            status = 0
        except BaseException:  # noqa: BLE001  # the process ends after any error
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    os.close(writing)
    attempt, deadline = Attempt(), None
    if kill is not None and kill.early:
        deadline = time.monotonic() + kill.seconds
    rest = b""
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], wait)[0]:
            attempt.before = step_in(root)
            os.kill(child, signal.SIGKILL)
            deadline = None  # its last reports are read to the end
            continue
        received = os.read(reading, 4096)
        if not received:
            break
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            word, *number = line.decode().split()
            if word == "began":
                attempt.began = int(number[0])
            elif word == "saved":
                attempt.saved = int(number[0])
            elif word == "done":
                attempt.done = True
            if kill is not None and deadline is None and word == ("operation" if kill.kind else "began"):
                deadline = time.monotonic() + kill.seconds
    os.close(reading)
    _, status = os.waitpid(child, 0)
    attempt.status = os.waitstatus_to_exitcode(status)
    attempt.errors = errors.read_text()
    return attempt


# Runs


def unequal(one: Path, other: Path) -> list[str]:
    """Which files of two results differ; the times in the arguments and logs are ignored."""
    names = ["weights.safetensors", "metrics.json"]
    names += [f"checkpoint/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
    different = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    places = [json.loads((end / "checkpoint" / "progress.json").read_text()) for end in (one, other)]
    return different + ["position" for key in ("epoch", "batch") if places[0][key] != places[1][key]]


@attrs.define
class Results:
    """Counts over all runs."""

    kills: int = 0
    lost: int = 0
    runs: int = 0
    phases: Counter[str] = attrs.Factory(Counter)
    kills_by_loop: Counter[str] = attrs.Factory(Counter)
    problems: list[str] = attrs.Factory(list)

    def problem(self, text: str) -> None:
        """A kill that lost something."""
        self.lost += 1
        self.problems.append(text)


def run(
    name: str, loop: Callable[..., Any], root: Path, reference: Path, generator: random.Random, limit: int, results: Results
) -> None:
    """One run from its beginning to its end, in as many attempts as the kills require, up to `limit` kills."""
    kills, durable, ending = 0, 0, root.with_suffix(".end")
    while True:
        kill = draw_kill(generator) if kills < limit else None
        attempt = fork_attempt(loop, root, kill, ending)
        after = step_in(root)
        if attempt.began is not None and attempt.began != durable:
            results.problem(f"{name}: step {durable} was complete, and the next attempt resumed from step {attempt.began}")
        if attempt.done:  # perhaps killed, but too late
            break
        if attempt.status != -signal.SIGKILL:
            results.problem(f"{name}: an attempt after {kills} kills failed:\n{attempt.errors}")
            return
        kills += 1
        results.kills += 1
        results.kills_by_loop[name] += 1
        results.phases[phase_of(root, attempt.began is not None)] += 1
        if after < max(durable, attempt.saved, attempt.before):
            results.problem(
                f"{name}: step {max(durable, attempt.saved, attempt.before)} was complete, and {after} is after {kill}"
            )
        broken = [path.name for path in listed(root) if not path.name.startswith(".") and not step_of(path)]
        if broken:
            results.problem(f"{name}: {broken} can be seen, and are not complete, after {kill}")
        durable = after
    results.runs += 1
    different = unequal(ending, reference)
    if different:
        results.problem(f"{name}: after {kills} kills the end differs in {', '.join(different)}")


def fuzz(kills: int, seed: int, root: Path) -> Results:
    """Kill until `kills` were counted, each loop about as often; a run is left to its end after at most 12 kills."""
    from tests.reliability.training_runs import LOOPS

    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads != 1:
        raise RuntimeError(f"{threads} threads run before the first fork, which is not safe: set {', '.join(THREADS)} to 1.")
    generator, results, number = random.Random(seed), Results(), 0
    references = {}
    for name, loop in LOOPS.items():
        references[name] = root / f"reference-{len(references)}.end"
        attempt = fork_attempt(loop, references[name].with_suffix(""), None, references[name])
        if not attempt.done:
            raise RuntimeError(f"{name}: the run that is not killed failed:\n{attempt.errors}")
    while results.kills < kills and not results.problems:
        name = min(LOOPS, key=lambda name: results.kills_by_loop[name])
        directory = root / f"run-{number}"
        limit = min(kills - results.kills, max(3, min(12, kills // 4)))
        run(name, LOOPS[name], directory, references[name], generator, limit, results)
        number += 1
        if not results.problems:
            shutil.rmtree(directory)
            shutil.rmtree(directory.with_suffix(".end"))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill training processes, resume them, and compare the end.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, if not given")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    began, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="kills-"))
    print(f"seed {seed}", flush=True)
    results = fuzz(given.kills, seed, root)
    for title, counts in (("phases", results.phases), ("loops", results.kills_by_loop)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    for problem in results.problems:
        print(problem)
    print(f"runs {results.runs}, all equal to those never killed: {not results.problems}; {time.monotonic() - began:.0f} s")
    print(f"kills {results.kills}, lost {results.lost}")
    if results.problems:
        print(f"the files of the runs are in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    for name in THREADS:
        os.environ[name] = "1"
    sys.exit(main())
