"""What is said where a process of a group is gone: torch's messages name an address, or no more than a time."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs

from fts.distributed.process_group import Group
from fts.errors import DistributedError
from fts.messages import some

OF_TORCH = re.compile(r"gloo|nccl|TCPStore|c10d|ProcessGroup", re.IGNORECASE)
CLOSED = re.compile(
    r"closed by peer|reset by peer|pair closure|Broken pipe|Connection refused|Socket closed|remote process exited|"
    r"ncclRemoteError|communicator was aborted|failed to (connect|recv|send)",
    re.IGNORECASE,
)
WAITED = re.compile(r"timed out|timeout", re.IGNORECASE)

RESTART = (
    "Start all processes again; with resume_from_checkpoint=True they go on from the newest whole checkpoint. "
    "torchrun --max-restarts does so by itself."
)

PATIENCE = 0.5
"""For so many seconds a process whose connections are closed may still be there."""


@attrs.frozen(eq=False)
class RankMonitor:
    """The other processes, for messages that name the one that is gone.

    Attributes:
        group: the processes.
        ids: the process ids of those on the same machine, by rank.

    >>> with Peers.of(Group()).clear_errors():
    ...     raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:30091")
    Traceback (most recent call last):
        ...
    fts.errors.DistributedError: Process 0 of 1 has lost another one: a connection was closed. ...
    """

    group: Group
    ids: Mapping[int, int] = attrs.field(factory=dict)

    @classmethod
    def of(cls, group: Group) -> RankMonitor:
        """Ask each process where it runs; all must ask.

        Args:
            group: the processes.
        """
        here = socket.gethostname()
        told = group.gather((here, os.getpid()))
        return cls(group, {rank: own for rank, (host, own) in enumerate(told) if host == here and rank != group.rank})

    @contextmanager
    def clear_errors(self) -> Iterator[None]:
        """A block in which torch's errors about lost processes become a `DistributedError`: which one, and what to do."""
        try:
            yield
        except RuntimeError as error:
            message = self.message(str(error))
            if message is None:
                raise
            raise DistributedError(message) from error

    def message(self, text: str) -> str | None:
        """What to say instead of an error of torch's.

        Args:
            text: its message.

        Returns:
            The words; None if the error has another reason than a process that is gone, or hangs.
        """
        closed = CLOSED.search(text)
        if not OF_TORCH.search(text) or not (closed or WAITED.search(text)):
            return None
        group = self.group
        gone = self.gone(PATIENCE if closed else 0.0)
        if gone:
            which = f"Process {some(gone)} of {group.size} is gone"
            return f"{which}: process {group.rank} has lost the connection; the others stop. Look at its last messages. {RESTART}"
        if closed:
            how = "has lost another one: a connection was closed. Look at what the others wrote last."
        else:
            how = "has waited for another one longer than the timeout (ddp_timeout): that one hangs, or is far behind."
        return f"Process {group.rank} of {group.size} {how} {RESTART}"

    def gone(self, patience: float = 0.0) -> list[int]:
        """The ranks of those on this machine that have ended.

        Args:
            patience: for how many seconds to look again if none has.
        """
        end = time.monotonic() + patience * bool(self.ids)
        while True:
            found = [rank for rank, own in self.ids.items() if not _is_alive(own)]
            if found or time.monotonic() >= end:
                return found
            time.sleep(0.01)


def _is_alive(own: int) -> bool:
    if Path("/proc/self/stat").exists():
        try:
            state = Path(f"/proc/{own}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in ("Z", "X")  # ended, and not yet asked after by its parent
    if os.name != "posix":  # nobody can tell without harm
        return True
    try:
        os.kill(own, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
