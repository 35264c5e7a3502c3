"""What fails in one process fails in all, so that none waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from fts.distributed.process_group import Group
from fts.errors import CheckpointError, DistributedError

Result = TypeVar("Result")


@contextmanager
def fail_together(group: Group) -> Iterator[None]:
    """A block that all processes go through, and that ends with an error in all of them where it does in one.

    Inside, nobody may wait for another one that could have failed before it came there.

    Args:
        group: the processes.

    Raises:
        CheckpointError: in those that met no error themselves; it says which process did, and what.

    >>> with fail_together(Group()):
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


def check_alike(group: Group, facts: Mapping[str, Any]) -> None:
    """Raise DistributedError where the processes do not all have the same values.

    Args:
        group: the processes; all must come here.
        facts: by name; can be pickled and compared.

    >>> check_alike(Group(), {"seed": 0})
    """
    for rank, told in enumerate(group.gather(dict(facts))):
        for name, value in facts.items():
            if told.get(name) != value:
                raise DistributedError(
                    f"Process {rank} has {name}={told.get(name)!r}, and process {group.rank} has {name}={value!r}. Start all "
                    "processes with the same script, arguments, data and seed."
                )


def broadcast_from_main(group: Group, function: Callable[[], Result]) -> Result:
    """What a function gives in the first process, in all of them.

    Args:
        group: the processes; all must come here.
        function: called in the first one alone; its result can be pickled.

    Raises:
        DistributedError: in the others, if it failed; the first one raises its own error.

    >>> broadcast_from_main(Group(), lambda: 3)
    3
    """
    if not group.is_first:
        found, problem = group.broadcast(None)
        if problem is not None:
            raise DistributedError(f"The first process failed, so this one ends, too. {problem}")
        return found  # type: ignore[no-any-return]
    try:
        found = function()
    except BaseException as error:
        group.broadcast((None, f"{type(error).__name__}: {error}"))
        raise
    group.broadcast((found, None))
    return found
