"""From indices to batches, in this process or in workers."""

from __future__ import annotations

import logging
import signal
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    default_collate,
    default_convert,
    get_worker_info,
)

from fts.errors import DataError, WorkerError
from fts.loops.dataloader_state import (
    Bookmark,
    Cursor,
    ReaderState,
    incomplete,
    isolated,
    keeps_state,
    loaded,
    marks_of,
    state_before,
    written,
)
from fts.loops.loader_options import Collate, Reading
from fts.loops.sampling import Indices, announce_epoch
from fts.loops.shards import Place
from fts.loops.worker_signals import sheltered
from fts.randomness import DATA, fold, seed_generators
from fts.steps.microbatches import PaddingBatch
from fts.typing import Batch

logger = logging.getLogger(__name__)

Request: TypeAlias = tuple[int, int | None, Indices, bool]
"""(epoch, seed of the fetch or None where nothing can draw, indices, whether the batch is `PaddingBatch`)."""


class Fetcher(Dataset[Batch]):
    """A dataset whose items are whole batches: a request in, a seeded and collated batch out.

    Args:
        dataset: map-style.
        collate: called with a list of items, or with one item where a fetch asks for one; None leaves them as they are.
        batched: whether requests hold several indices.
    """

    def __init__(self, dataset: Any, collate: Collate | None, batched: bool) -> None:
        self.dataset = dataset
        self.collate = collate
        self.batched = batched
        self.epoch = -1

    def __getitem__(self, request: Request) -> Batch:
        epoch, seed, indices, weightless = request
        if epoch != self.epoch:  # also in a worker, whose copy of the dataset nobody else can reach
            announce_epoch(self.dataset, epoch)
            self.epoch = epoch
        if seed is not None:
            seed_generators(seed)
        items = self._items(indices)
        batch = items if self.collate is None else self.collate(items)
        return PaddingBatch(batch) if weightless else batch

    def _items(self, indices: Indices) -> Any:
        if not self.batched:
            return self.dataset[indices]
        chosen = indices.tolist() if isinstance(indices, Tensor) else indices
        many = getattr(self.dataset, "__getitems__", None)
        return many(chosen) if callable(many) else [self.dataset[index] for index in chosen]


class Stream(IterableDataset[Batch]):
    """An iterable dataset whose items are whole, seeded and collated batches.

    Each worker has its share, as in torch: its batch `i`, if it is worker `w` of `k`, is seeded as number `i * k + w`,
    which is its place in the epoch as long as no worker has run out.

    Where the data has `state_dict` and `load_state_dict`, each batch comes with the state that it leaves the data in.

    Args:
        reading: names iterable data.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        reason = incomplete(reading.data)
        self.stateful = keeps_state(reading.data) and not isinstance(reading.data, Iterator) and not reason
        readers = max(1, reading.loading.get("num_workers", 0))
        # the data itself is read for several epochs, or copies of it that live on in their workers
        lasting = not reading.loading or bool(reading.loading.get("persistent_workers"))
        self.bookmark = Bookmark(readers, lasting, f"a {type(reading.data).__name__}", reason)
        self.marks: list[ReaderState] = []
        self.turn = 0
        # the epoch, and whether it begins at the marks: a tensor, because in shared memory workers that live for several epochs
        # see it change
        self.place = torch.zeros(2, dtype=torch.int64)

    def __iter__(self) -> Iterator[Any]:
        """What a worker gives: batches, or batches with marks."""
        worker = get_worker_info()
        reader, readers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, at_marks = self.place.tolist()
        mark = next((mark for mark in self.marks if mark.reader == reader), None) if at_marks else None
        made = self._undone(self._made(epoch, reader, readers, 0 if mark is None else mark.taken, mark))
        if not self.stateful:
            return (batch for batch, _ in made)
        # whoever had its turn before the place of the cursor lets one pass
        pause = [(None, mark._replace(empty=True))] if mark is not None and reader < self.turn else []
        return chain(pause, made)

    def batches(self, epoch: int, start: int = 0, cursor: Cursor | None = None, per_step: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, read in this process; without a cursor, the others are consumed.

        Of those, the last `per_step - 1` may be missing.
        """
        mark = next(iter(self.begin(epoch, start, cursor)), None)
        for batch, found in self._undone(self._made(epoch, 0, 1, start, mark, per_step)):
            if not self.stateful or self.bookmark.note(found):
                yield batch

    def begin(self, epoch: int, start: int, cursor: Cursor | None) -> list[ReaderState]:
        """Set where the next iteration begins: at batch `start`, if there is a cursor."""
        self.marks, self.turn = ([], 0) if cursor is None else marks_of(cursor)
        if self.bookmark.readers == 1:  # in batches of this run's size
            self.marks = [mark._replace(taken=start) for mark in self.marks]
        self.place[0], self.place[1] = epoch, cursor is not None
        self.bookmark.begin(epoch, start if cursor is not None else 0, self.marks, self.turn)
        return self.marks

    def _undone(self, made: Iterator[tuple[Batch, ReaderState]]) -> Iterator[tuple[Batch, ReaderState]]:
        """The same; left before its end, it leaves the data at the place where it was, so that the next epoch begins there."""
        before = state_before(self.reading.data) if self.stateful else None
        try:
            yield from made
            before = None
        finally:
            if before is not None:
                self.reading.data.load_state_dict(before)

    def _made(
        self, epoch: int, reader: int, readers: int, start: int, mark: ReaderState | None, per_step: int = 1
    ) -> Iterator[tuple[Batch, ReaderState]]:
        """A reader's batches from its number `start` on, each with its mark."""
        size, seed, collate = self.reading.batch_size, self.reading.seed, self.reading.collate
        announce_epoch(self.reading.data, epoch)
        data = isolated(self.reading.data)
        if mark is not None:
            loaded(data, mark)
        seed_generators(fold(seed, DATA, epoch, reader))
        ended = mark is not None and mark.ended
        items = iter(()) if ended else iter(data)
        for number in count(0 if mark is None else start):
            seed_generators(fold(seed, DATA, epoch, reader + number * readers))
            try:
                found = list(islice(items, size or 1))
            except Exception as error:
                if mark is None or number > start or data is self.reading.data:
                    raise
                # `datasets` cannot load some states in a worker; the copy that failed is dropped
                logger.warning("Skipped items are read again, because %s does not load its state: %r", self.bookmark.kind, error)
                yield from self._made(epoch, reader, readers, start, None, per_step)
                return
            short = len(found) < (size or 1)
            if not found or (short and self.reading.drop_last):
                if mark is None and number <= start - per_step:
                    raise too_short(start, number)
                if self.stateful:
                    yield None, written(data, reader, number, ended=True, empty=True)
                return
            after = written(data, reader, number + 1, ended=short) if self.stateful else _NO_MARK
            if mark is None and number < start:
                self.bookmark.note(after)
                continue
            batch = found if size else found[0]
            yield batch if collate is None else collate(batch), after


_NO_MARK = ReaderState(0)


def skip(batches: Iterator[Batch], start: int, per_step: int) -> Iterator[Batch]:
    """Consume `start` batches of which the last `per_step - 1` may be missing, and give the rest."""
    for number in range(start):
        if next(batches, _END) is _END:
            if number <= start - per_step:
                raise too_short(start, number)
            return
    yield from batches


_END = object()


def too_short(start: int, found: int) -> DataError:
    """The error for an epoch that cannot be resumed because it has only `found` batches."""
    return DataError(
        f"The data cannot be resumed at batch {start}: the epoch has {found} batches. The data, the batch size, the "
        "micro-batches of a step or the number of processes differ from those of the run which is to be continued."
    )


def row_batches(tensors: tuple[Tensor, ...], places: Iterable[Place]) -> Iterator[Batch]:
    """What the default collate function makes of a TensorDataset's items, with one indexing operation a tensor."""
    for _, indices, weightless in places:
        batch = [tensor.index_select(0, indices if tensor.is_cpu else indices.to(tensor.device)) for tensor in tensors]
        yield PaddingBatch(batch) if weightless else batch


def has_rows(dataset: Any, collate: Collate | None) -> bool:
    """Whether `row_batches` gives what fetching and collating item by item would."""
    return (
        type(dataset) is TensorDataset
        and collate is default_collate
        and all(type(tensor) is Tensor and tensor.layout == torch.strided for tensor in dataset.tensors)
    )


def can_draw(dataset: Any, collate: Collate | None) -> bool:
    """Whether a fetch may use random numbers, as far as one can tell."""
    return type(dataset) not in (list, tuple, range, TensorDataset) or collate not in (None, default_collate, default_convert)


class Plan:
    """A sampler whose requests are exchanged from epoch to epoch, since workers that live on keep their loader."""

    requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


@attrs.define(eq=False)
class Workers:
    """Runs a `Fetcher` or `Stream` in a DataLoader's workers, which may live for several epochs.

    Attributes:
        options: arguments of `torch.utils.data.DataLoader`, such as `num_workers`.
        plan: what the present epoch asks for. It must not lead back here: a loader that is part of a cycle is collected
            after its queues, and then its workers are waited for in vain.
        loader: made at the first epoch.
        running: what epochs are taken from at present.
        closed: how often they were ended from outside.
    """

    options: dict[str, Any]
    plan: Plan = attrs.field(factory=Plan)
    loader: DataLoader[Any] | None = None
    running: weakref.WeakSet[Any] = attrs.field(factory=weakref.WeakSet, repr=False)
    closed: int = 0

    def close(self) -> None:
        """End the workers, and what they have read ahead; the next epoch starts others."""
        self.closed += 1
        for batches in list(self.running):
            _end(batches)
        self.loader = None

    def fetch(self, fetcher: Fetcher, requests: Iterable[Request], seed: int) -> Iterator[Batch]:
        """Fetch each request, in order."""
        self.plan.requests = requests
        return self._start(fetcher, seed, sampler=self.plan)

    def stream(
        self, stream: Stream, epoch: int, start: int, cursor: Cursor | None, seed: int, per_step: int = 1
    ) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, taken from the workers in turn; `per_step` as in `Stream.batches`."""
        stream.place.share_memory_()  # type: ignore[no-untyped-call]
        stream.begin(epoch, start, cursor)
        if cursor is not None:
            self.close()  # workers that are there do not know it
        announce_epoch(stream.reading.data, epoch)  # where workers share it, before they start
        found = self._start(stream, seed)
        if stream.stateful:
            found = (batch for batch, mark in found if stream.bookmark.note(mark))
        return skip(found, start, per_step) if cursor is None else found

    def _start(self, dataset: Any, seed: int, **sampler: Any) -> Iterator[Batch]:
        loader = self.loader
        if loader is None or not loader.persistent_workers:
            # a generator of its own, so that starting workers does not move the global one
            loader = DataLoader(
                dataset, batch_size=None, collate_fn=_same, generator=torch.Generator(), **sampler, **self.options
            )
            self.loader = loader
        loader.generator.manual_seed(seed)
        batches = sheltered(loader)
        self.running.add(batches)
        return self._until_error(batches, self.closed)

    def _until_error(self, batches: Any, closed: int) -> Iterator[Any]:
        """The batches; an error ends the workers at once: its traceback keeps the loader until it is too late for that."""
        try:
            yield from batches
            if self.closed != closed:
                raise DataError("The source was closed while this epoch was read. Close it when all is read.")
        except Exception as error:
            # a worker that ends while it hands over a batch is seen as a connection that breaks
            broken = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) or "DataLoader worker" in str(error)
            ends = _ends_of(batches._workers) if broken else ""
            _end(batches)
            self.loader = None
            if ends:
                raise WorkerError(
                    f"A DataLoader worker ended: {ends}. If nobody killed it, the system did, because memory was short: use "
                    "fewer workers, or a smaller prefetch factor. Without workers the data's own errors are seen as they are."
                ) from error
            raise
        finally:
            if not self.options.get("persistent_workers"):
                _end(batches)


def _end(batches: Any) -> None:
    if hasattr(batches, "_shutdown_workers"):  # not where this process fetches itself
        batches._shutdown_workers()


def _ends_of(workers: Iterable[Any]) -> str:
    """How those processes that ended by themselves did so."""
    found = []
    for process in workers:
        process.join(0.5)
        if process.exitcode:
            code = process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
            found.append(f"process {process.pid} {how}")
    return ", ".join(found)


def _same(batch: Batch) -> Batch:
    return batch
