"""Agreeing on a number at each step without waiting for each other."""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import distributed

from fts.distributed.process_group import Group
from fts.distributed.rank_monitor import RankMonitor


class AsyncAllReduceMax:
    """The greatest number of all processes, one call late: for `StopRequest.agree`, `Timer.agree`, and whatever is polled.

    Each call collects what the call before has begun, and begins to exchange the number that it is given. So processes that take
    equally long never wait, and all see the same answers at the same calls. After an answer other than 0 nothing is under way,
    and the next answer is 0: who has asked acts on the answer first (a timer is reset), and what was given with that call is
    given again if it still holds. All processes must call equally often. The numbers go through the CPU.

    Each question needs an agreement of its own: the answer to one call belongs to the call before.

    Args:
        group: the processes; one that is alone is answered at once.
        timeout: how long a call waits for the others, in seconds; None for torch's own for gloo.

    Raises:
        DistributedError: (from calls and `close`) a process is gone, or hangs.

    >>> agree = AsyncAllReduceMax(Group())
    >>> agree(143)
    143
    >>> agree.close()
    """

    def __init__(self, group: Group, timeout: float | timedelta | None = None) -> None:
        self.group = group
        self.peers = RankMonitor.of(group)
        self.handle: Any = None
        self.pending: Any = None
        self.number = torch.zeros(1, dtype=torch.int64)
        if group.size > 1:
            limit = timeout if timeout is None or isinstance(timeout, timedelta) else timedelta(seconds=timeout)
            ranks = None if group.handle is None else distributed.get_process_group_ranks(group.handle)
            self.handle = distributed.new_group(ranks, timeout=limit, backend="gloo")

    def __call__(self, number: int) -> int:
        """The greatest number that was given to the call before.

        Args:
            number: from 0.

        Returns:
            The same in each process.
        """
        if self.group.size == 1:
            return number
        answer = self._collect()
        if answer == 0:
            self.number.fill_(number)
            with self.peers.clear_errors():
                self.pending = distributed.all_reduce(self.number, distributed.ReduceOp.MAX, self.handle, async_op=True)
        return answer

    def close(self) -> None:
        """Wait for what is under way, and leave; all processes must."""
        self._collect()
        if self.handle is not None:
            distributed.destroy_process_group(self.handle)
            self.handle = None

    def __enter__(self) -> AsyncAllReduceMax:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:  # else the others may never come
            self.close()

    def _collect(self) -> int:
        pending, self.pending = self.pending, None
        if pending is None:
            return 0
        with self.peers.clear_errors():
            pending.wait()
        return int(self.number)
