"""Kills training processes at random instants, lets them resume, and compares the end with a run that was never killed.

    python -m tests.reliability.kills --kills 200 --seed 1

A life is a process that goes on from what it finds in the directory of its run. It is killed (SIGKILL) at an instant drawn from
the seed: after some time, at one of its file operations, or some milliseconds after one. So kills land in steps, in saves,
between their renames, in deletions and in resumes. After each, the newest complete checkpoint must be one that was there before,
or a newer one, and the next life must go on from it. The life that reaches the end must have the bits of the run that was never
killed: weights, optimizer, position and logged figures.

One process imports everything and forks each life, so that a life costs a fraction of a second.
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
"""Kinds of file operations: up to which of them a life may come, and Python's audit events of them. Flushing opens a file."""


@attrs.frozen
class Kill:
    """When a life ends.

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


# A life


def run_attempt(way: Callable[..., Any], root: Path, pipe: int, kill: Kill | None, ending: Path) -> None:
    """Run to the end and leave what it led to at `result_of`; called in a process of its own."""
    import torch
    from safetensors.torch import save_file

    def tell(text: str) -> None:
        os.write(pipe, f"{text}\n".encode())

    torch.set_num_threads(1)
    if kill is not None and kill.kind is not None:
        _count_operations(root, kill, tell)
    module, figures = way(root, tell)
    shutil.rmtree(ending, ignore_errors=True)  # of a life that was killed here
    ending.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, ending / "weights.safetensors")
    (ending / "figures.json").write_text(json.dumps(figures, sort_keys=True))
    shutil.copytree(newest_complete(root), ending / "checkpoint")
    tell("done")


def _count_operations(root: Path, kill: Kill, tell: Callable[[str], None]) -> None:
    here, count, names = str(root) + os.sep, 0, OPERATIONS[kill.kind or "any"][1]

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in names:
            return
        path = arguments[0]
        # what is deleted with a whole directory is named within it
        relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if not relative and not (isinstance(path, str | os.PathLike) and os.fspath(path).startswith(here)):
            return
        count += 1
        if count == kill.count:
            if kill.seconds == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            tell("operation")

    sys.addaudithook(heard)


# Its end


def newest_complete(root: Path) -> Path:
    """The complete checkpoint of the highest step, as its manifest says: read here anew, not with fts. Whatever its name.

    Raises:
        FileNotFoundError: there is none.
    """
    found = {step: path for path in listed(root) if (step := step_of(path)) and not path.name.endswith((".writing", ".deleting"))}
    if not found:
        raise FileNotFoundError(f"no complete checkpoint in {root}")
    return found[max(found)]


def listed(root: Path) -> list[Path]:
    """What is in a run's directory, which may not be there yet."""
    return list(root.iterdir()) if root.is_dir() else []


def step_of(path: Path) -> int:
    """The step of a checkpoint; 0 if it is not complete."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        whole = all(xxhash.xxh3_128_hexdigest((path / name).read_bytes()) == files[name]["xxh3_128"] for name in files)
        return int(json.loads((path / "state.json").read_text())["step"]) if whole else 0
    except (OSError, ValueError):  # incomplete, or going at this moment
        return 0


def step_in(root: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max((step_of(path) for path in listed(root) if not path.name.endswith((".writing", ".deleting"))), default=0)


def phase_of(root: Path, began: bool) -> str:
    """What a life was doing when it was killed, by what it left."""
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
    """What was heard of a process, and how it ended."""

    began: int | None = None
    saved: int = 0
    before: int = 0
    done: bool = False
    status: int = 0
    errors: str = ""


def fork_attempt(way: Callable[..., Any], root: Path, kill: Kill | None, ending: Path) -> Attempt:
    """Fork a life, kill it when it is time, and say what was heard of it."""
    reading, writing = os.pipe()
    errors = root.with_suffix(".err")
    errors.write_bytes(b"")  # also where a life is killed before it has opened the file
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with errors.open("w") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            run_attempt(way, root, writing, kill, ending)
            status = 0
        except BaseException:  # noqa: BLE001  # the process ends here, whatever it was
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    os.close(writing)
    life, deadline = Attempt(), None
    if kill is not None and kill.early:
        deadline = time.monotonic() + kill.seconds
    rest = b""
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], wait)[0]:
            life.before = step_in(root)
            os.kill(child, signal.SIGKILL)
            deadline = None  # what it still said is read to the end
            continue
        heard = os.read(reading, 4096)
        if not heard:
            break
        *lines, rest = (rest + heard).split(b"\n")
        for line in lines:
            word, *number = line.decode().split()
            if word == "began":
                life.began = int(number[0])
            elif word == "saved":
                life.saved = int(number[0])
            elif word == "done":
                life.done = True
            if kill is not None and deadline is None and word == ("operation" if kill.kind else "began"):
                deadline = time.monotonic() + kill.seconds
    os.close(reading)
    _, status = os.waitpid(child, 0)
    life.status = os.waitstatus_to_exitcode(status)
    life.errors = errors.read_text()
    return life


# Runs


def unequal(one: Path, other: Path) -> list[str]:
    """Which files of two ends differ; the times in the arguments and logs are left out."""
    names = ["weights.safetensors", "figures.json"]
    names += [f"checkpoint/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
    different = [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]
    places = [json.loads((end / "checkpoint" / "progress.json").read_text()) for end in (one, other)]
    return different + ["position" for key in ("epoch", "batch") if places[0][key] != places[1][key]]


@attrs.define
class Results:
    """What was counted over all runs."""

    kills: int = 0
    lost: int = 0
    runs: int = 0
    phases: Counter[str] = attrs.Factory(Counter)
    ways: Counter[str] = attrs.Factory(Counter)
    problems: list[str] = attrs.Factory(list)

    def problem(self, text: str) -> None:
        """A kill that lost something."""
        self.lost += 1
        self.problems.append(text)


def run(
    name: str, way: Callable[..., Any], root: Path, reference: Path, generator: random.Random, limit: int, tally: Results
) -> None:
    """One run from its beginning to its end, through as many lives as the kills make of it, up to `limit` kills."""
    kills, durable, ending = 0, 0, root.with_suffix(".end")
    while True:
        kill = draw_kill(generator) if kills < limit else None
        life = fork_attempt(way, root, kill, ending)
        after = step_in(root)
        if life.began is not None and life.began != durable:
            tally.problem(f"{name}: step {durable} was complete, and the next life went on from step {life.began}")
        if life.done:  # perhaps killed, but too late
            break
        if life.status != -signal.SIGKILL:
            tally.problem(f"{name}: a life after {kills} kills failed:\n{life.errors}")
            return
        kills += 1
        tally.kills += 1
        tally.ways[name] += 1
        tally.phases[phase_of(root, life.began is not None)] += 1
        if after < max(durable, life.saved, life.before):
            tally.problem(f"{name}: step {max(durable, life.saved, life.before)} was complete, and {after} is after {kill}")
        broken = [path.name for path in listed(root) if not path.name.startswith(".") and not step_of(path)]
        if broken:
            tally.problem(f"{name}: {broken} can be seen, and are not complete, after {kill}")
        durable = after
    tally.runs += 1
    different = unequal(ending, reference)
    if different:
        tally.problem(f"{name}: after {kills} kills the end differs in {', '.join(different)}")


def fuzz(kills: int, seed: int, root: Path) -> Results:
    """Kill until `kills` were counted, each way of running about as often; a run goes to its end after at most 12 kills."""
    from tests.reliability.training_runs import LOOPS

    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads != 1:
        raise RuntimeError(f"{threads} threads run before the first fork, which is not safe: set {', '.join(THREADS)} to 1.")
    generator, tally, number = random.Random(seed), Results(), 0
    references = {}
    for name, way in LOOPS.items():
        references[name] = root / f"reference-{len(references)}.end"
        life = fork_attempt(way, references[name].with_suffix(""), None, references[name])
        if not life.done:
            raise RuntimeError(f"{name}: the run that is not killed failed:\n{life.errors}")
    while tally.kills < kills and not tally.problems:
        name = min(LOOPS, key=lambda name: tally.ways[name])
        directory = root / f"run-{number}"
        limit = min(kills - tally.kills, max(3, min(12, kills // 4)))
        run(name, LOOPS[name], directory, references[name], generator, limit, tally)
        number += 1
        if not tally.problems:
            shutil.rmtree(directory)
            shutil.rmtree(directory.with_suffix(".end"))
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill training processes, resume them, and compare the end.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, if not given")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    began, root = time.monotonic(), Path(tempfile.mkdtemp(prefix="kills-"))
    print(f"seed {seed}", flush=True)
    tally = fuzz(given.kills, seed, root)
    for title, counts in (("phases", tally.phases), ("ways", tally.ways)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    for problem in tally.problems:
        print(problem)
    print(f"runs {tally.runs}, all equal to those never killed: {not tally.problems}; {time.monotonic() - began:.0f} s")
    print(f"kills {tally.kills}, lost {tally.lost}")
    if tally.problems:
        print(f"what is left of the runs is in {root}")
        return 1
    shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    for name in THREADS:
        os.environ[name] = "1"
    sys.exit(main())
