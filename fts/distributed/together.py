"""What fails in one process fails in all, so that none waits for one that has given up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fts.distributed.group import Group
from fts.errors import CheckpointError


@contextmanager
def together(group: Group) -> Iterator[None]:
    """A block that all processes go through, and that ends with an error in all of them where it does in one.

    Inside, nobody may wait for another one that could have failed before it came there.

    Args:
        group: the processes.

    Raises:
        CheckpointError: in those that met no error themselves; it says which process did, and what.

    >>> with together(Group()):
    ...     pass
    """
    if group.size == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # raised below, when the others know
        own = error
    told = group.gather(None if own is None else (type(own).__name__, str(own)))
    if own is not None:
        raise own
    for rank, problem in enumerate(told):
        if problem is not None:
            raise CheckpointError(f"Process {rank} failed, so this one ends, too. {problem[0]}: {problem[1]}")
