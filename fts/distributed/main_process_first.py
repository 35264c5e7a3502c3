"""The main process first, without a collective: collectives have a timeout, and the work may take long."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from fts.distributed.process_group import is_initialized
from fts.errors import DistributedError

DONE = "done"
MAX_POLL_SECONDS = 0.5
"""Longest time between two checks of whether the main process is done."""

_call_numbers = itertools.count()


@contextmanager
def main_process_first(is_main_process: bool, desc: str, *, scope: str = "") -> Iterator[None]:
    """A block that the main process runs before the other ranks, which wait for it as long as it takes.

    All ranks of torch's default process group must call it, equally often. Without a process group nothing waits.

    Args:
        is_main_process: whether this rank runs the block first.
        desc: the work, in words.
        scope: the ranks that wait for the same process, if not all do: the name of their machine, for instance.

    Raises:
        DistributedError: on the ranks that wait, if the main process failed.

    >>> with main_process_first(True, "tokenizing"):
    ...     pass
    """
    if not is_initialized() or distributed.get_world_size() == 1:
        yield
        return
    store = distributed.distributed_c10d._get_default_store()
    key = f"fts/first/{next(_call_numbers)}/{scope}"
    if not is_main_process:
        _wait_for_main(store, key, desc)
        yield
        return
    try:
        yield
    except BaseException as error:
        store.set(key, f"{type(error).__name__}: {error}")
        raise
    store.set(key, DONE)


def _wait_for_main(store: Any, key: str, desc: str) -> None:
    pause = 0.001
    try:
        while not store.check([key]):  # polled, since a wait inside torch does not react to signals
            time.sleep(pause)
            pause = min(2 * pause, MAX_POLL_SECONDS)
        status = store.get(key).decode()
    except RuntimeError as error:
        raise DistributedError(
            f"The process that was to finish {desc!r} first is gone, or the store that connects the processes is."
        ) from error
    if status != DONE:
        raise DistributedError(f"The process that was to finish {desc!r} first failed, so this one ends, too. {status}")
