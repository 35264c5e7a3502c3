"""Where the readers of a stream are, in the words of the data itself: `state_dict` and `load_state_dict`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from copy import copy, deepcopy
from typing import Any, NamedTuple, TypeAlias

import attrs

from fts.errors import CheckpointError

logger = logging.getLogger(__name__)

Cursor: TypeAlias = dict[str, Any]
"""What JSON can hold of a place in a stream; see `Bookmark.cursor`."""


class ReaderState(NamedTuple):
    """Where one reader of a stream is.

    Attributes:
        reader: which worker it is, from 0.
        taken: how many batches it has made in this epoch.
        state: the data's `state_dict()` after the last of them.
        ended: whether it found the end of its share.
        empty: whether no batch comes with this mark.
    """

    reader: int
    taken: int = 0
    state: Any = None
    ended: bool = False
    empty: bool = False


def keeps_state(data: Any) -> bool:
    """Whether data can say where its iteration is, and begin there.

    >>> keeps_state([1, 2])
    False
    """
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def written(data: Any, reader: int, taken: int, *, ended: bool = False, empty: bool = False) -> ReaderState:
    """Where a reader is, with the state of its data."""
    state = data.state_dict()
    return ReaderState(reader, taken, state if _of_datasets(data) else deepcopy(state), ended, empty)


def loaded(data: Any, mark: ReaderState) -> None:
    """Let the next iteration of data begin at a mark."""
    data.load_state_dict(deepcopy(mark.state))


def state_before(data: Any) -> Any:
    """The state of data between two iterations; None for data whose iterations are `isolated`, or which has none as yet."""
    if _of_datasets(data):
        return None
    try:
        return deepcopy(data.state_dict())
    except Exception:  # noqa: BLE001  # there may be one only while it is iterated
        return None


def isolated(data: Any) -> Any:
    """The data itself, or for an iterable dataset of Hugging Face `datasets` a copy whose iteration has a state of its own.

    Two of them that were made of one (`take`, `skip`, `map`) share the parts that count, so that iterating one moves the state
    of the other.
    """
    if not _of_datasets(data):
        return data
    alone = object.__new__(type(data))  # its own copy would share the attributes
    alone.__dict__.update(data.__dict__)
    alone._ex_iterable = _apart(data._ex_iterable)
    return alone


def _of_datasets(data: Any) -> bool:
    return hasattr(data, "_ex_iterable")


def incomplete(data: Any) -> str:
    """Why the state of data does not say all about what comes next; empty if nothing is known against it.

    Hugging Face `datasets` leave out of it what a shuffle buffer holds, and fill the buffer anew.
    """
    buffered = any(
        type(part).__name__ == "BufferShuffledExamplesIterable" and getattr(part, "buffer_size", 0) != 1
        for part in _parts(getattr(data, "_ex_iterable", None))
    )
    return "its state_dict() leaves out what its shuffle buffer holds" if buffered else ""


_INNER = ("ex_iterable", "_interleaved")


def _parts(part: Any) -> Iterator[Any]:
    if part is None:
        return
    yield part
    for inner in [*(getattr(part, name, None) for name in _INNER), *getattr(part, "ex_iterables", ())]:
        yield from _parts(inner)


def _apart(part: Any) -> Any:
    own = copy(part)
    for name in _INNER:
        if getattr(part, name, None) is not None:
            setattr(own, name, _apart(getattr(part, name)))
    if hasattr(part, "ex_iterables"):
        own.ex_iterables = [_apart(inner) for inner in part.ex_iterables]
    return own


@attrs.define
class Bookmark:
    """The place in a stream of the batch that was handed out last; workers, which read ahead, may be further.

    Attributes:
        readers: how many workers divide the stream; 1 without.
        lasting: whether what the data remembers at the end of an epoch is there in the next one.
        kind: the data, in words.
        reason: why it has no state that says all; empty if it has.
        epoch: which one.
        taken: the loader's batches so far in it.
        turn: which reader has the next one.
        marks: of each reader that has made any.
        told: whether it was said that there is no state.
    """

    readers: int
    lasting: bool
    kind: str
    reason: str = ""
    epoch: int = -1
    taken: int = 0
    turn: int = 0
    marks: dict[int, ReaderState] = attrs.field(factory=dict)
    told: bool = False

    def begin(self, epoch: int, taken: int, marks: list[ReaderState], turn: int) -> None:
        """A new iteration, at the beginning of an epoch or at a cursor."""
        if not marks and self.lasting and epoch == self.epoch + 1 and self._ended:
            marks = self._between()
        self.epoch, self.taken, self.turn = epoch, taken, turn
        self.marks = {mark.reader: mark for mark in marks}

    def note(self, mark: ReaderState) -> bool:
        """Take in where a reader is; whether a batch came with it."""
        self.marks[mark.reader] = mark
        if mark.empty:
            return False
        self.taken += 1
        self.turn = (mark.reader + 1) % self.readers
        return True

    def cursor(self, epoch: int, batch: int, micro_batches: int) -> Cursor | None:
        """The place before a step's batch, if this iteration stands there.

        Args:
            epoch: which one.
            batch: which of the steps' batches.
            micro_batches: how many of the loader's batches make one.
        """
        if self.reason:
            self._tell(self.reason)
            return None
        if epoch == self.epoch + 1 and batch == 0 and self._ended and self.lasting:
            return self._written(self._between(), 0)
        here = batch * micro_batches == self.taken or (self._ended and -(-self.taken // micro_batches) == batch)
        if epoch != self.epoch or not here:
            return None
        return self._written(list(self.marks.values()), self.turn)

    @property
    def _ended(self) -> bool:
        return len(self.marks) == self.readers and all(mark.ended for mark in self.marks.values())

    def _between(self) -> list[ReaderState]:
        """The marks after the end of an epoch, at the beginning of the next."""
        return [mark._replace(taken=0, ended=False, empty=False) for mark in self.marks.values()]

    def _written(self, marks: list[ReaderState], turn: int) -> Cursor | None:
        readers: list[dict[str, Any] | None] = [None] * self.readers
        for mark in marks:
            readers[mark.reader] = {"taken": mark.taken, "ended": mark.ended, "state": mark.state}
        cursor = {"turn": turn, "readers": readers}
        reason = _unlike_json(cursor)
        if reason:
            self._tell(reason)
            return None
        return dict(json.loads(json.dumps(cursor)))

    def _tell(self, reason: str) -> None:
        if not self.told:
            logger.warning(
                "The place in %s cannot be kept in checkpoints: %s. A resumed run reads again what it skips.", self.kind, reason
            )
            self.told = True


def marks_of(cursor: Cursor) -> tuple[list[ReaderState], int]:
    """The marks of a cursor, and whose turn it is.

    Raises:
        CheckpointError: it is damaged.

    >>> marks_of({"turn": 0, "readers": [{"taken": 2, "ended": False, "state": {"at": 4}}]})
    ([Mark(reader=0, taken=2, state={'at': 4}, ended=False, empty=False)], 0)
    """
    readers, turn = cursor.get("readers"), cursor.get("turn")
    if not isinstance(readers, list) or not isinstance(turn, int) or not 0 <= turn < len(readers):
        raise CheckpointError(f"The place in a stream is damaged: it has readers={readers!r:.80} and turn={turn!r}.")
    marks = []
    for reader, entry in enumerate(readers):
        if entry is None:
            continue
        if not isinstance(entry, dict) or not _is_count(entry.get("taken")) or not isinstance(entry.get("ended"), bool):
            raise CheckpointError(f"The place in a stream is damaged: that of reader {reader} is {entry!r:.80}.")
        marks.append(ReaderState(reader, entry["taken"], entry.get("state"), entry["ended"]))
    return marks, turn


def _unlike_json(cursor: Cursor) -> str:
    """Why a state would not come back from JSON as it is; empty if it would."""
    try:
        text = json.dumps(cursor)
    except (TypeError, ValueError, RecursionError) as error:
        return f"its state_dict() holds what JSON cannot ({error})"
    return "" if json.loads(text) == cursor else "its state_dict() has tuples, or keys that are no texts"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
