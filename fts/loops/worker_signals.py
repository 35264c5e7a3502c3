"""DataLoader workers that ignore the signals that stop a run: schedulers send them to every process of a job."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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
