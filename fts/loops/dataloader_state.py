"""The state of an iteration over a stream, from the data's own `state_dict` and `load_state_dict`, as torchdata keeps it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from copy import copy, deepcopy
from typing import Any, NamedTuple, TypeAlias

import attrs

from fts.errors import CheckpointError

logger = logging.getLogger(__name__)

StateDict: TypeAlias = dict[str, Any]
"""The JSON form of a position in a stream; see `DataLoaderState.state_dict`."""


class WorkerState(NamedTuple):
    """Where one worker of a stream is.

    Attributes:
        worker_id: from 0; also 0 where there are no workers.
        num_yielded: how many batches it has made in this epoch.
        state: the data's `state_dict()` after the last of them.
        ended: whether it reached the end of its part of the stream.
        empty: whether it comes without a batch.
    """

    worker_id: int
    num_yielded: int = 0
    state: Any = None
    ended: bool = False
    empty: bool = False


def is_stateful(data: Any) -> bool:
    """Whether data has `state_dict` and `load_state_dict`, torchdata's `Stateful` protocol.

    >>> is_stateful([1, 2])
    False
    """
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def capture_state(data: Any, worker_id: int, num_yielded: int, *, ended: bool = False, empty: bool = False) -> WorkerState:
    """Where a worker is, with the state of its data."""
    state = data.state_dict()
    return WorkerState(worker_id, num_yielded, state if _is_hf_iterable(data) else deepcopy(state), ended, empty)


def restore_state(data: Any, worker_state: WorkerState) -> None:
    """Let the next iteration of data begin at a worker's state."""
    data.load_state_dict(deepcopy(worker_state.state))


def idle_state(data: Any) -> Any:
    """The state of data between two iterations; None where iterations are isolated (see `isolate`), or there is none yet."""
    if _is_hf_iterable(data):
        return None
    try:
        return deepcopy(data.state_dict())
    except Exception:  # noqa: BLE001  # there may be one only while it is iterated
        return None


def isolate(data: Any) -> Any:
    """The data itself, or for an iterable dataset of Hugging Face `datasets` a copy whose iteration has a state of its own.

    Datasets that were derived from one (`take`, `skip`, `map`) share the parts that count, so iterating one would change the
    state of the other.
    """
    if not _is_hf_iterable(data):
        return data
    isolated = object.__new__(type(data))  # its own copy would share the attributes
    isolated.__dict__.update(data.__dict__)
    isolated._ex_iterable = _copy_iterable(data._ex_iterable)
    return isolated


def _is_hf_iterable(data: Any) -> bool:
    return hasattr(data, "_ex_iterable")


def incomplete_state_reason(data: Any) -> str:
    """Why the state of data does not determine what comes next; empty if no reason is known.

    Hugging Face `datasets` leave the content of a shuffle buffer out of it, and fill the buffer anew.
    """
    buffered = any(
        type(part).__name__ == "BufferShuffledExamplesIterable" and getattr(part, "buffer_size", 0) != 1
        for part in _nested_iterables(getattr(data, "_ex_iterable", None))
    )
    return "its state_dict() leaves out what its shuffle buffer holds" if buffered else ""


_INNER = ("ex_iterable", "_interleaved")


def _nested_iterables(iterable: Any) -> Iterator[Any]:
    if iterable is None:
        return
    yield iterable
    for inner in [*(getattr(iterable, name, None) for name in _INNER), *getattr(iterable, "ex_iterables", ())]:
        yield from _nested_iterables(inner)


def _copy_iterable(iterable: Any) -> Any:
    own = copy(iterable)
    for name in _INNER:
        if getattr(iterable, name, None) is not None:
            setattr(own, name, _copy_iterable(getattr(iterable, name)))
    if hasattr(iterable, "ex_iterables"):
        own.ex_iterables = [_copy_iterable(inner) for inner in iterable.ex_iterables]
    return own


@attrs.define
class DataLoaderState:
    """The position in a stream of the batch that was yielded last; workers, which prefetch, may be further.

    Attributes:
        num_workers: how many workers divide the stream; 1 without any.
        persistent: whether the data's state at the end of an epoch is there in the next one.
        kind: the data, in words.
        incomplete_reason: why the data has no state that determines what comes next; empty if it has.
        epoch: the current epoch.
        num_yielded: the loader's batches so far in it.
        next_worker: which worker has the next one.
        worker_states: by the id of each worker that has made any.
        warned: whether a warning said that the state cannot be saved.
    """

    num_workers: int
    persistent: bool
    kind: str
    incomplete_reason: str = ""
    epoch: int = -1
    num_yielded: int = 0
    next_worker: int = 0
    worker_states: dict[int, WorkerState] = attrs.field(factory=dict)
    warned: bool = False

    def begin(self, epoch: int, num_yielded: int, worker_states: list[WorkerState], next_worker: int) -> None:
        """A new iteration, at the beginning of an epoch or at a restored state."""
        if not worker_states and self.persistent and epoch == self.epoch + 1 and self._ended:
            worker_states = self._at_next_epoch()
        self.epoch, self.num_yielded, self.next_worker = epoch, num_yielded, next_worker
        self.worker_states = {one.worker_id: one for one in worker_states}

    def update(self, worker_state: WorkerState) -> bool:
        """Record where a worker is; whether a batch came with it."""
        self.worker_states[worker_state.worker_id] = worker_state
        if worker_state.empty:
            return False
        self.num_yielded += 1
        self.next_worker = (worker_state.worker_id + 1) % self.num_workers
        return True

    def state_dict(self, epoch: int, batch: int, micro_batches: int) -> StateDict | None:
        """The state before a step's batch, if this iteration is there.

        Args:
            epoch: the epoch of the batch.
            batch: which of the steps' batches.
            micro_batches: how many of the loader's batches make one.
        """
        if self.incomplete_reason:
            self._warn(self.incomplete_reason)
            return None
        if epoch == self.epoch + 1 and batch == 0 and self._ended and self.persistent:
            return self._to_json(self._at_next_epoch(), 0)
        is_there = batch * micro_batches == self.num_yielded or (self._ended and -(-self.num_yielded // micro_batches) == batch)
        if epoch != self.epoch or not is_there:
            return None
        return self._to_json(list(self.worker_states.values()), self.next_worker)

    @property
    def _ended(self) -> bool:
        return len(self.worker_states) == self.num_workers and all(one.ended for one in self.worker_states.values())

    def _at_next_epoch(self) -> list[WorkerState]:
        """The workers' states after the end of an epoch, at the beginning of the next."""
        return [one._replace(num_yielded=0, ended=False, empty=False) for one in self.worker_states.values()]

    def _to_json(self, worker_states: list[WorkerState], next_worker: int) -> StateDict | None:
        readers: list[dict[str, Any] | None] = [None] * self.num_workers
        for one in worker_states:
            readers[one.worker_id] = {"taken": one.num_yielded, "ended": one.ended, "state": one.state}
        state_dict = {"turn": next_worker, "readers": readers}
        reason = _not_json_reason(state_dict)
        if reason:
            self._warn(reason)
            return None
        return dict(json.loads(json.dumps(state_dict)))

    def _warn(self, reason: str) -> None:
        if not self.warned:
            logger.warning(
                "The position in %s cannot be saved in checkpoints: %s. A resumed run reads the skipped examples again.",
                *(self.kind, reason),
            )
            self.warned = True


def worker_states_of(state_dict: StateDict) -> tuple[list[WorkerState], int]:
    """The workers' states in a state dict, and the id of the worker that has the next batch.

    Raises:
        CheckpointError: it is corrupt.

    >>> worker_states_of({"turn": 0, "readers": [{"taken": 2, "ended": False, "state": {"at": 4}}]})
    ([WorkerState(worker_id=0, num_yielded=2, state={'at': 4}, ended=False, empty=False)], 0)
    """
    readers, next_worker = state_dict.get("readers"), state_dict.get("turn")
    if not isinstance(readers, list) or not isinstance(next_worker, int) or not 0 <= next_worker < len(readers):
        raise CheckpointError(f"The position in a stream is corrupt: it has readers={readers!r:.80} and turn={next_worker!r}.")
    worker_states = []
    for worker_id, entry in enumerate(readers):
        if entry is None:
            continue
        if not isinstance(entry, dict) or not _is_count(entry.get("taken")) or not isinstance(entry.get("ended"), bool):
            raise CheckpointError(f"The position in a stream is corrupt: that of reader {worker_id} is {entry!r:.80}.")
        worker_states.append(WorkerState(worker_id, entry["taken"], entry.get("state"), entry["ended"]))
    return worker_states, next_worker


def _not_json_reason(state_dict: StateDict) -> str:
    """Why a state would change in a round trip through JSON; empty if it would not."""
    try:
        text = json.dumps(state_dict)
    except (TypeError, ValueError, RecursionError) as error:
        return f"its state_dict() has values that JSON cannot represent ({error})"
    return "" if json.loads(text) == state_dict else "its state_dict() has tuples, or keys that are not strings"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
