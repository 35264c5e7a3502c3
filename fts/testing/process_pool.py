"""Laws that need several processes: real ones, started once for many examples.

The processes start afresh (`spawn`), so a script that calls this needs `if __name__ == "__main__":`, and what they run is found
by its name in its module.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fts.errors import ArgumentError
from fts.testing import strategies
from fts.testing.comparison import LawError
from fts.testing.sharded import SHARDING_LAYOUTS, sharded_equals_full
from fts.testing.transform_checks import run_examples
from fts.typing import Params, Transform

Run: TypeAlias = Callable[..., list[Any]]
"""`run(function, *arguments)`: what each process makes of it, by rank."""

_PATIENCE = 5.0  # seconds that the others get to answer where one process has failed


class _Answer(NamedTuple):
    value: Any
    error: str = ""
    is_law: bool = False
    silent: bool = False


_MEET = pickle.dumps((torch.distributed.barrier, ()))


@contextmanager
def process_pool(count: int = 2, *, timeout: float = 120.0) -> Iterator[Run]:
    """Start processes that form a group with gloo, and let them run functions until the block ends.

    Args:
        count: how many.
        timeout: seconds for one function, and for each exchange in it.

    Yields:
        `run(function, *arguments)`: every process calls the function, which must be found by its name in a module; the arguments
        and results are pickled. It returns the results by rank. Where a function raises, `run` raises LawError or RuntimeError
        with the words of a process that failed; where the processes have lost each other they are started anew for the next.

    Raises:
        ArgumentError: `count` is below 2, or what is to be run cannot be sent.

    >>> with process_pool(2) as run:  # doctest: +SKIP
    ...     run(torch.distributed.get_rank)
    [0, 1]
    """
    if count < 2:
        raise ArgumentError(f"processes: count must be at least 2, not {count!r}.")
    started: list[tuple[Any, Connection]] = []

    def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        try:
            message = pickle.dumps((function, arguments))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ArgumentError(
                f"{function!r} or its arguments cannot be sent to other processes ({error}). Define it at the top of a module."
            ) from error
        if not started:
            started.extend(_start(count, timeout))
        answers = _asked(started, message, timeout)
        failed = [answer for answer in answers if answer.error]
        if failed:
            # those that have lost each other are of no more use, and one that still waits may not be asked anything else
            if any(answer.silent for answer in answers) or any(answer.error for answer in _asked(started, _MEET, _PATIENCE)):
                _stop(started)
            # a process that lost the others says less than the one that left them
            first = min(failed, key=lambda answer: (not answer.is_law, answer.silent))
            raise LawError(first.error) if first.is_law else RuntimeError(first.error)
        return [answer.value for answer in answers]

    try:
        yield run
    finally:
        _stop(started)


def check_sharded_transform(
    make_transform: Callable[[], Transform],
    *,
    processes: int = 2,
    params: SearchStrategy[Params] | Params | None = None,
    steps: int = 2,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    spreads: Collection[str] = tuple(SHARDING_LAYOUTS),
) -> None:
    """Check that a transform gives on tensors that are spread over processes what it gives on whole ones.

    The processes are started once; Hypothesis's active profile says how many examples they see.

    Args:
        make_transform: makes the transform in each process: a function at the top of a module, or `functools.partial` of one.
        processes: how many; an even number.
        params: parameters, or a strategy of them, for a transform that knows names or shapes; None generates any.
        steps: the largest number of successive updates.
        dtypes: of generated parameters.
        spreads: how tensors are spread: names of `fts.testing.sharded.SHARDING_LAYOUTS`.

    Raises:
        LawError: the law does not hold. The message names the transform, the layout, the parameter and both values.
        ArgumentError: the function cannot be sent to other processes, or an argument is out of range.

    >>> import functools
    >>> from fts import transforms as tx
    >>> check_sharded_transform(functools.partial(tx.clip_by_global_norm, 1.0))  # doctest: +SKIP
    """
    if processes < 2 or processes % 2:
        raise ArgumentError(f"check_sharded_transform: processes must be an even number, not {processes!r}.")
    tree = (
        strategies.params(dtypes=dtypes) if params is None else st.just(dict(params)) if isinstance(params, Mapping) else params
    )
    examples = st.tuples(strategies.trajectories(tree, length=steps), st.sampled_from(sorted(spreads)))
    with _group(processes) as run:

        def check(example: Any) -> None:
            trajectory, spread = example
            run(_holds, make_transform, *trajectory, spread)

        run_examples(check, examples)


def _holds(make_transform: Callable[[], Transform], params: Params, gradients: list[Params], spread: str) -> None:
    sharded_equals_full(make_transform(), params, gradients, spread=spread)


_group = process_pool  # an argument has the same name


def _start(count: int, timeout: float) -> list[tuple[Any, Connection]]:
    context = multiprocessing.get_context("spawn")
    meeting = Path(tempfile.mkdtemp(prefix="fts-processes-")) / "meeting"
    started: list[tuple[Any, Connection]] = []
    for rank in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, count, str(meeting), timeout, theirs), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def _stop(started: list[tuple[Any, Connection]]) -> None:
    for process, line in started:
        line.close()
        process.kill()
    for process, _ in started:
        process.join()
    started.clear()


def _asked(started: list[tuple[Any, Connection]], message: bytes, timeout: float) -> list[_Answer]:
    """What each process says; where one has failed, the others, which may wait for it, get little time."""
    lines = [line for _, line in started]
    for line in lines:
        with suppress(OSError):  # one that has ended does not answer either
            line.send_bytes(message)
    answers = {line: _Answer(None, f"a process gave no answer in {timeout:g} seconds", silent=True) for line in lines}
    waiting, until = set(lines), time.monotonic() + timeout
    while waiting and (ready := wait(list(waiting), max(0.0, until - time.monotonic()))):
        for line in waiting.intersection(ready):
            waiting.remove(line)
            try:
                answers[line] = _Answer(*pickle.loads(line.recv_bytes()))  # noqa: S301  # from a process that this one started
            except (EOFError, ConnectionError):
                answers[line] = _Answer(None, "a process has ended", silent=True)
            if answers[line].error:
                until = min(until, time.monotonic() + _PATIENCE)
    return [answers[line] for line in lines]


def _serve(rank: int, count: int, meeting: str, timeout: float, line: Connection) -> None:
    """Run what comes, in one of the processes."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            message = line.recv_bytes()
        except EOFError:  # the other end has gone
            return
        try:
            function, arguments = pickle.loads(message)  # noqa: S301  # from the process that started this one
            answer = _Answer(function(*arguments))
        except LawError as error:
            answer = _Answer(None, str(error), True)
        except Exception as error:  # noqa: BLE001  # is told to the other end
            answer = _Answer(None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        line.send_bytes(pickle.dumps(tuple(answer)))
