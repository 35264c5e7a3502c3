"""An all-reduce of one number per step that no process waits for."""

from __future__ import annotations

from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import distributed

from fts.distributed.process_group import Group
from fts.distributed.rank_monitor import RankMonitor


class AsyncAllReduceMax:
    """The maximum over all ranks, one call late: for `StopRequest.agree`, `Timer.agree`, and other flags that are polled.

    Each call returns the result of the all-reduce that the previous call started, and starts one of its own number. So ranks that
    take equally long never wait, and all get the same results at the same calls. After a result other than 0 no all-reduce is
    pending, and the next result is 0: the caller acts on the result first (a timer is reset), and passes its number again if it
    still applies. All ranks must call equally often. The numbers go through the CPU.

    Use one instance for each quantity: the result of a call belongs to the previous call.

    Args:
        group: the processes; a single one gets its number back at once.
        timeout: how long a call waits for the other ranks, in seconds; None for torch's default for gloo.

    Raises:
        DistributedError: (from calls and `close`) a process has ended, or hangs.

    >>> agree = AsyncAllReduceMax(Group())
    >>> agree(143)
    143
    >>> agree.close()
    """

    def __init__(self, group: Group, timeout: float | timedelta | None = None) -> None:
        self.group = group
        self.monitor = RankMonitor.create(group)
        self.process_group: Any = None
        self.pending: Any = None
        self.buffer = torch.zeros(1, dtype=torch.int64)
        if group.size > 1:
            limit = timeout if timeout is None or isinstance(timeout, timedelta) else timedelta(seconds=timeout)
            ranks = None if group.process_group is None else distributed.get_process_group_ranks(group.process_group)
            self.process_group = distributed.new_group(ranks, timeout=limit, backend="gloo")

    def __call__(self, number: int) -> int:
        """The maximum of the numbers that the ranks passed to the previous call.

        Args:
            number: from 0.

        Returns:
            The same on each rank.
        """
        if self.group.size == 1:
            return number
        result = self._wait_pending()
        if result == 0:
            self.buffer.fill_(number)
            with self.monitor.translate_errors():
                self.pending = distributed.all_reduce(self.buffer, distributed.ReduceOp.MAX, self.process_group, async_op=True)
        return result

    def close(self) -> None:
        """Wait for a pending all-reduce and destroy the process group; all ranks must call it."""
        self._wait_pending()
        if self.process_group is not None:
            distributed.destroy_process_group(self.process_group)
            self.process_group = None

    def __enter__(self) -> AsyncAllReduceMax:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:  # after an error the other ranks may never call it
            self.close()

    def _wait_pending(self) -> int:
        pending, self.pending = self.pending, None
        if pending is None:
            return 0
        with self.monitor.translate_errors():
            pending.wait()
        return int(self.buffer)
