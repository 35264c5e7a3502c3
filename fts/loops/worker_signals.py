"""DataLoader workers that ignore the signals that stop a run: schedulers send them to every process of a job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader

from fts.loops.preemption import SignalHandler


def iterate_ignoring_signals(loader: DataLoader[Any]) -> Iterator[Any]:
    """An iterator of torch's DataLoader, whose workers ignore the signals that `handle_preemption` handles now.

    A worker that is killed by one would lose the batches that the last update needs. The workers end when this process shuts them
    down, or dies.

    >>> list(iterate_ignoring_signals(DataLoader(range(4), batch_size=2)))
    [tensor([0, 1]), tensor([2, 3])]
    """
    numbers = [int(number) for number in signal.valid_signals() if isinstance(signal.getsignal(number), SignalHandler)]
    if not numbers or not loader.num_workers:
        return DataLoader.__iter__(loader)
    given = loader.worker_init_fn
    closing = multiprocessing.RawValue("b", 0)
    loader.worker_init_fn = partial(_init_worker, numbers, closing, given)
    try:
        with _blocked(numbers):
            batches = DataLoader.__iter__(loader)
    finally:
        loader.worker_init_fn = given
    for worker in getattr(batches, "_workers", ()):
        if hasattr(worker._popen, "_send_signal"):  # not on Windows, where they are killed anyway
            worker._popen.terminate = partial(_terminate, worker._popen, closing)
    return batches


class WorkerExitHandler:
    """torch's handler of SIGCHLD, whose error about a dead worker of fts waits for the next fetch.

    By itself torch raises it wherever the main thread is, as in the middle of a step or a save.
    """

    def __init__(self, handler: Callable[[int, Any], Any]) -> None:
        self.handler = handler
        self.workers: WeakSet[Any] = WeakSet()
        self.fetching = False
        self.error: RuntimeError | None = None

    def __call__(self, number: int, frame: Any) -> None:
        """Handle the signal."""
        try:
            self.handler(number, frame)
        except RuntimeError as error:
            if self.fetching or not any(_is_about(error, worker) for worker in self.workers):
                raise
            self.error = error


def _child_handler() -> Any:
    """The handler of SIGCHLD; None on Windows, which has no such signal."""
    return signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None


def _is_about(error: RuntimeError, worker: Any) -> bool:
    return f"(pid {worker.pid})" in str(error)


@contextmanager
def worker_errors() -> Iterator[None]:
    """A block that fetches a batch: an error about a dead worker is raised in it, and only in it.

    >>> with worker_errors():
    ...     batch = next(iter(DataLoader(range(4))))
    """
    handler = _child_handler()
    if not isinstance(handler, WorkerExitHandler):
        yield
        return
    error, handler.error, handler.fetching = handler.error, None, True
    try:
        if error is not None:
            raise error
        yield
    finally:
        handler.fetching = False


def defer_worker_errors(batches: Any) -> None:
    """Let `worker_errors` decide where an error about the workers of a DataLoader's iterator is raised."""
    handler = _child_handler()
    is_torchs = getattr(handler, "__module__", None) == "torch.utils.data._utils.signal_handling"
    if is_torchs and callable(handler) and threading.current_thread() is threading.main_thread():
        handler = WorkerExitHandler(handler)
        signal.signal(signal.SIGCHLD, handler)
    if isinstance(handler, WorkerExitHandler):
        handler.workers.update(getattr(batches, "_workers", ()))


def forget_worker_errors(batches: Any) -> None:
    """Drop what is known of the workers of a DataLoader's iterator, which are shut down: no later fetch is concerned by them."""
    handler = _child_handler()
    if isinstance(handler, WorkerExitHandler):
        for worker in getattr(batches, "_workers", ()):
            handler.workers.discard(worker)
            if handler.error is not None and _is_about(handler.error, worker):
                handler.error = None


@contextmanager
def _blocked(numbers: Iterable[int]) -> Iterator[None]:
    """Block signals in this process and in the workers that start meanwhile, until these have their handlers."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(numbers: list[int], closing: Any, given: Callable[[int], object] | None, worker: int) -> None:
    """The `worker_init_fn` of a worker."""
    for number in numbers:
        # a handler, not SIG_IGN, which programs that the data starts would inherit
        signal.signal(number, partial(_ignore, closing))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    if given is not None:
        given(worker)


def _ignore(closing: Any, number: int, frame: Any) -> None:
    """Ignore a signal, unless the main process is shutting its workers down."""
    if closing.value:
        os._exit(0)  # any other status would be an error to torch


def _terminate(process: Any, closing: Any) -> None:
    """End a worker that does not end by itself, for which torch and multiprocessing send SIGTERM."""
    closing.value = 1
    process._send_signal(signal.SIGTERM)
    if process.wait(1.0) is None:
        process.kill()
