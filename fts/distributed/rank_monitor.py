"""Clear errors when a rank has died or hangs: torch's messages name only an address or a time."""

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
from fts.messages import abbreviate

TORCH_DISTRIBUTED = re.compile(r"gloo|nccl|TCPStore|c10d|ProcessGroup", re.IGNORECASE)
CONNECTION_CLOSED = re.compile(
    r"closed by peer|reset by peer|pair closure|Broken pipe|Connection refused|Socket closed|remote process exited|"
    r"ncclRemoteError|communicator was aborted|failed to (connect|recv|send)",
    re.IGNORECASE,
)
TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)

RESTART_ADVICE = (
    "Start all processes again; with resume_from_checkpoint=True they resume from the newest valid checkpoint. "
    "torchrun --max-restarts does so by itself."
)

GRACE_SECONDS = 0.5
"""How long a process may still be running after its connections were closed."""


@attrs.frozen(eq=False)
class RankMonitor:
    """Finds ranks that have ended, for error messages that name them.

    Attributes:
        group: the processes.
        pids: the process ids of the other ranks on the same machine, by rank.

    >>> with RankMonitor.create(Group()).translate_errors():
    ...     raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:30091")
    Traceback (most recent call last):
        ...
    fts.errors.DistributedError: Process 0 of 1 has lost another one: a connection was closed. ...
    """

    group: Group
    pids: Mapping[int, int] = attrs.field(factory=dict)

    @classmethod
    def create(cls, group: Group) -> RankMonitor:
        """Gather the hosts and process ids of all ranks; collective.

        Args:
            group: the processes.
        """
        own_host = socket.gethostname()
        processes = group.all_gather_object((own_host, os.getpid()))
        pids = {rank: pid for rank, (host, pid) in enumerate(processes) if host == own_host and rank != group.rank}
        return cls(group, pids)

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """A block in which torch's errors about lost processes become a `DistributedError` with the rank, and what to do."""
        try:
            yield
        except RuntimeError as error:
            message = self.error_message(str(error))
            if message is None:
                raise
            raise DistributedError(message) from error

    def error_message(self, text: str) -> str | None:
        """The message that replaces one of torch's.

        Args:
            text: torch's message.

        Returns:
            The message; None if the error has another cause than a process that has ended, or hangs.
        """
        closed = CONNECTION_CLOSED.search(text)
        if not TORCH_DISTRIBUTED.search(text) or not (closed or TIMED_OUT.search(text)):
            return None
        group = self.group
        dead = self.dead_ranks(GRACE_SECONDS if closed else 0.0)
        if dead:
            reason = f"process {group.rank} has lost the connection; the others stop. Look at its last messages."
            return f"Process {abbreviate(dead)} of {group.size} is gone: {reason} {RESTART_ADVICE}"
        if closed:
            reason = "has lost another one: a connection was closed. Look at what the others wrote last."
        else:
            reason = "has waited for another one longer than the timeout (ddp_timeout): that one hangs, or is far behind."
        return f"Process {group.rank} of {group.size} {reason} {RESTART_ADVICE}"

    def dead_ranks(self, patience: float = 0.0) -> list[int]:
        """The ranks on this machine that have ended.

        Args:
            patience: for how many seconds to keep checking if none has.
        """
        end = time.monotonic() + patience * bool(self.pids)
        while True:
            dead = [rank for rank, pid in self.pids.items() if not _is_alive(pid)]
            if dead or time.monotonic() >= end:
                return dead
            time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    if Path("/proc/self/stat").exists():
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in ("Z", "X")  # zombie, dead
    if os.name != "posix":  # no harmless check
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
