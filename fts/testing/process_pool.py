"""A pool of processes that form a gloo process group, started once for many examples.

The processes are spawned, so a script that uses this needs `if __name__ == "__main__":`, and functions are pickled by name.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from fts.errors import ArgumentError
from fts.testing.comparison import LawError

Run: TypeAlias = Callable[..., list[Any]]
"""`run(function, *arguments)`: the results of all ranks."""

_GRACE_SECONDS = 5.0  # for the results of the other processes, after one has failed


class _Result(NamedTuple):
    value: Any
    error: str = ""
    is_law_error: bool = False
    is_missing: bool = False


_BARRIER = pickle.dumps((torch.distributed.barrier, ()))


@contextmanager
def process_pool(count: int = 2, *, timeout: float = 120.0) -> Iterator[Run]:
    """Start processes that form a gloo group, and let them run functions until the block ends.

    Args:
        count: the world size.
        timeout: seconds for one function, and for each collective in it.

    Yields:
        `run(function, *arguments)`: every process calls the function, which must be at the top of a module; the arguments and
        results are pickled. It returns the results by rank. If a function raises, `run` raises LawError or RuntimeError with the
        message of a process that failed; if the processes have lost their connections, the next call starts new ones.

    Raises:
        ArgumentError: `count` is below 2, or the function cannot be pickled.

    >>> with process_pool(2) as run:  # doctest: +SKIP
    ...     run(torch.distributed.get_rank)
    [0, 1]
    """
    if count < 2:
        raise ArgumentError(f"process_pool: count must be at least 2, not {count!r}.")
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
        results = _call_all(started, message, timeout)
        failed = [result for result in results if result.error]
        if failed:
            # processes that have lost their connections, or still wait, cannot be used any more
            if any(result.is_missing for result in results) or any(
                result.error for result in _call_all(started, _BARRIER, _GRACE_SECONDS)
            ):
                _stop(started)
            # the error of the first failure says more than the lost connections that follow
            first = min(failed, key=lambda result: (not result.is_law_error, result.is_missing))
            raise LawError(first.error) if first.is_law_error else RuntimeError(first.error)
        return [result.value for result in results]

    try:
        yield run
    finally:
        _stop(started)


def _start(count: int, timeout: float) -> list[tuple[Any, Connection]]:
    context = multiprocessing.get_context("spawn")
    rendezvous = Path(tempfile.mkdtemp(prefix="fts-processes-")) / "rendezvous"
    started: list[tuple[Any, Connection]] = []
    for rank in range(count):
        parent_end, child_end = context.Pipe()
        process = context.Process(target=_serve, args=(rank, count, str(rendezvous), timeout, child_end), daemon=True)
        process.start()
        child_end.close()
        started.append((process, parent_end))
    return started


def _stop(started: list[tuple[Any, Connection]]) -> None:
    for process, connection in started:
        connection.close()
        process.kill()
    for process, _ in started:
        process.join()
    started.clear()


def _call_all(started: list[tuple[Any, Connection]], message: bytes, timeout: float) -> list[_Result]:
    """The result of each process; once one has failed, the others, which may wait for it, get little time."""
    connections = [connection for _, connection in started]
    for connection in connections:
        with suppress(OSError):  # the process has ended
            connection.send_bytes(message)
    results = {
        connection: _Result(None, f"a process did not answer in {timeout:g} seconds", is_missing=True)
        for connection in connections
    }
    waiting, until = set(connections), time.monotonic() + timeout
    while waiting and (ready := wait(list(waiting), max(0.0, until - time.monotonic()))):
        for connection in waiting.intersection(ready):
            waiting.remove(connection)
            try:
                results[connection] = _Result(*pickle.loads(connection.recv_bytes()))  # noqa: S301  # from a process that this one started
            except (EOFError, ConnectionError):
                results[connection] = _Result(None, "a process has ended", is_missing=True)
            if results[connection].error:
                until = min(until, time.monotonic() + _GRACE_SECONDS)
    return [results[connection] for connection in connections]


def _serve(rank: int, count: int, rendezvous: str, timeout: float, connection: Connection) -> None:
    """Serve calls, in one of the processes."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:  # the parent has closed the connection
            return
        try:
            function, arguments = pickle.loads(message)  # noqa: S301  # from the process that started this one
            result = _Result(function(*arguments))
        except LawError as error:
            result = _Result(None, str(error), True)
        except Exception as error:  # noqa: BLE001  # is sent to the parent
            result = _Result(None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        connection.send_bytes(pickle.dumps(tuple(result)))
