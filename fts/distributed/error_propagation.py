"""Errors that reach all ranks: when one fails, the others raise too, and do not wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from fts.distributed.process_group import Group
from fts.errors import CheckpointError, DistributedError

Result = TypeVar("Result")


@contextmanager
def fail_together(group: Group) -> Iterator[None]:
    """A block that all ranks run, and that raises on all ranks if it raises on one.

    Do not call collectives inside that another rank may not reach after an error.

    Args:
        group: the processes.

    Raises:
        CheckpointError: on the ranks that had no error; it names the rank that failed, and its error.

    >>> with fail_together(Group()):
    ...     pass
    """
    if group.size == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # raised below, when the other ranks know
        own = error
    errors = group.all_gather_object(None if own is None else (type(own).__name__, str(own)))
    if own is not None:
        raise own
    for rank, failure in enumerate(errors):
        if failure is not None:
            raise CheckpointError(f"Process {rank} failed, so this one ends, too. {failure[0]}: {failure[1]}")


def check_same_on_all_ranks(group: Group, values: Mapping[str, Any]) -> None:
    """Raise DistributedError where the ranks have different values; collective.

    Args:
        group: the processes.
        values: by name; can be pickled and compared.

    >>> check_same_on_all_ranks(Group(), {"seed": 0})
    """
    for rank, others in enumerate(group.all_gather_object(dict(values))):
        for name, value in values.items():
            if others.get(name) != value:
                raise DistributedError(
                    f"Process {rank} has {name}={others.get(name)!r}, and process {group.rank} has {name}={value!r}. Start all "
                    "processes with the same script, arguments, data and seed."
                )


def broadcast_from_main(group: Group, function: Callable[[], Result]) -> Result:
    """The result of a function that the main process calls, on all ranks; collective.

    Args:
        group: the processes.
        function: called on the main process only; its result can be pickled.

    Raises:
        DistributedError: on the other ranks, if it failed; the main process raises the error itself.

    >>> broadcast_from_main(Group(), lambda: 3)
    3
    """
    if not group.is_main_process:
        result, failure = group.broadcast_object(None)
        if failure is not None:
            raise DistributedError(f"The main process failed, so this one ends, too. {failure}")
        return result  # type: ignore[no-any-return]
    try:
        result = function()
    except BaseException as error:
        group.broadcast_object((None, f"{type(error).__name__}: {error}"))
        raise
    group.broadcast_object((result, None))
    return result
