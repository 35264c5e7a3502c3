"""Workers that live through the signals which ask a run to stop: schedulers send them to every process of a job."""

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
    """What torch's DataLoader iterates by, whose workers pass over the signals that `handle_preemption` handles at present.

    A worker that died of them would take the batches with it that the last update needs. They end when this process closes them,
    or is gone.

    >>> list(iterate_ignoring_signals(DataLoader(range(4), batch_size=2)))
    [tensor([0, 1]), tensor([2, 3])]
    """
    numbers = [int(number) for number in signal.valid_signals() if isinstance(signal.getsignal(number), SignalHandler)]
    if not numbers or not loader.num_workers:
        return DataLoader.__iter__(loader)
    given = loader.worker_init_fn
    closing = multiprocessing.RawValue("b", 0)
    loader.worker_init_fn = partial(_begin, numbers, closing, given)
    try:
        with _held_back(numbers):
            batches = DataLoader.__iter__(loader)
    finally:
        loader.worker_init_fn = given
    for worker in getattr(batches, "_workers", ()):
        if hasattr(worker._popen, "_send_signal"):  # not on Windows, where they are killed anyway
            worker._popen.terminate = partial(_end, worker._popen, closing)
    return batches


@contextmanager
def _held_back(numbers: Iterable[int]) -> Iterator[None]:
    """A block during which signals wait, here and in the processes that start in it: these are not ready for them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(numbers: list[int], closing: Any, given: Callable[[int], object] | None, worker: int) -> None:
    """What a worker does first."""
    for number in numbers:
        # a handler rather than SIG_IGN: programs that the data start are not to inherit it
        signal.signal(number, partial(_pass_over, closing))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    if given is not None:
        given(worker)


def _pass_over(closing: Any, number: int, frame: Any) -> None:
    """Leave it to the process that loads when its workers end."""
    if closing.value:
        os._exit(0)  # any other status would be an error to torch


def _end(process: Any, closing: Any) -> None:
    """End a worker that does not end when it is closed, for which torch and multiprocessing send SIGTERM."""
    closing.value = 1
    process._send_signal(signal.SIGTERM)
    if process.wait(1.0) is None:
        process.kill()
