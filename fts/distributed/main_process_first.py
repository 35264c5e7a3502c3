"""One process before the others, without a collective operation: these have a time limit, and the work may take long."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from fts.distributed.process_group import is_started
from fts.errors import DistributedError

DONE = "done"
LONGEST_PAUSE = 0.5
"""Seconds between two looks at whether the first one is done."""

_numbers = itertools.count()


@contextmanager
def main_process_first(is_first: bool, what: str, *, among: str = "") -> Iterator[None]:
    """A block that one process goes through before the others, which wait for it as long as it takes.

    Every process of torch's group has to come here, and as often as the others. Without a group nobody waits.

    Args:
        is_first: whether this is the one.
        what: the work, in words.
        among: which processes wait for the same one, if not all do: the name of their machine, for instance.

    Raises:
        DistributedError: to those that wait, if the first one failed.

    >>> with main_process_first(True, "tokenizing"):
    ...     pass
    """
    if not is_started() or distributed.get_world_size() == 1:
        yield
        return
    store = distributed.distributed_c10d._get_default_store()
    key = f"fts/first/{next(_numbers)}/{among}"
    if not is_first:
        _wait(store, key, what)
        yield
        return
    try:
        yield
    except BaseException as error:
        store.set(key, f"{type(error).__name__}: {error}")
        raise
    store.set(key, DONE)


def _wait(store: Any, key: str, what: str) -> None:
    pause = 0.001
    try:
        while not store.check([key]):  # in steps, since a wait inside of torch does not hear of signals
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        answer = store.get(key).decode()
    except RuntimeError as error:
        raise DistributedError(
            f"The process that was to finish {what!r} first is gone, or what connects the processes is."
        ) from error
    if answer != DONE:
        raise DistributedError(f"The process that was to finish {what!r} first failed, so this one ends, too. {answer}")
