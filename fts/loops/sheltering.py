"""Workers that live through the signals which ask a run to stop: schedulers send them to every process of a job."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from fts.loops.interrupting import Handler


def sheltered(loader: DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)`, whose workers pass over the signals that `interruptible` has taken over at present.

    A worker that died of them would take the batches with it that the last update needs. They end when this process closes them,
    or is gone. Those that do not are killed, as torch would end them by a signal that they pass over.

    >>> list(sheltered(DataLoader(range(4), batch_size=2)))
    [tensor([0, 1]), tensor([2, 3])]
    """
    numbers = [int(number) for number in signal.valid_signals() if isinstance(signal.getsignal(number), Handler)]
    if not numbers or not loader.num_workers:
        return iter(loader)
    given = loader.worker_init_fn
    loader.worker_init_fn = partial(_begin, numbers, given)
    try:
        with _held_back(numbers):
            batches = iter(loader)
    finally:
        loader.worker_init_fn = given
    for worker in getattr(batches, "_workers", ()):
        worker._popen.terminate = worker._popen.kill
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


def _begin(numbers: list[int], given: Callable[[int], object] | None, worker: int) -> None:
    """What a worker does first."""
    for number in numbers:
        # a handler rather than SIG_IGN: programs that the data start are not to inherit it
        signal.signal(number, _pass_over)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    if given is not None:
        given(worker)


def _pass_over(number: int, frame: Any) -> None:
    """The process that loads decides when its workers end."""
