"""The workers of a DataLoader, which fetch batches ahead."""

from __future__ import annotations

import signal
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader

from fts.errors import DataError, WorkerError
from fts.loops.dataloader_state import StateDict
from fts.loops.fetcher import IterableDatasetFetcher, MapDatasetFetcher, Request, skip_batches
from fts.loops.sampling import set_epoch
from fts.loops.worker_signals import (
    defer_worker_errors,
    forget_worker_errors,
    iterate_ignoring_signals,
    worker_errors,
)
from fts.typing import Batch


class RequestSampler:
    """A sampler whose requests are replaced at each epoch, since persistent workers keep their loader."""

    requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


@attrs.define(eq=False)
class WorkerPool:
    """Runs a `MapDatasetFetcher` or `IterableDatasetFetcher` in a DataLoader's workers, which may persist for several epochs.

    Attributes:
        options: arguments of `torch.utils.data.DataLoader`, such as `num_workers`.
        sampler: what the current epoch requests. It must not lead back to this object: a loader that is part of a cycle is
            collected after its queues, and then torch waits for its workers until a timeout.
        loader: made at the first epoch.
        running: the loader's iterators that are in use.
        num_closed: how often `close` was called.
    """

    options: dict[str, Any]
    sampler: RequestSampler = attrs.field(factory=RequestSampler)
    loader: DataLoader[Any] | None = None
    running: weakref.WeakSet[Any] = attrs.field(factory=weakref.WeakSet, repr=False)
    num_closed: int = 0

    def close(self) -> None:
        """Shut the workers down, with what they have prefetched; the next epoch starts others."""
        self.num_closed += 1
        for batches in list(self.running):
            _shut_down(batches)
        self.loader = None

    def fetch(self, fetcher: MapDatasetFetcher, requests: Iterable[Request], seed: int) -> Iterator[Batch]:
        """Fetch each request, in order."""
        self.sampler.requests = requests
        return self._start(fetcher, seed, sampler=self.sampler)

    def stream(
        self,
        fetcher: IterableDatasetFetcher,
        epoch: int,
        start: int,
        state_dict: StateDict | None,
        seed: int,
        per_step: int = 1,
    ) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, from one worker after the other.

        Args:
            fetcher: what the workers run.
            epoch: from 0.
            start: the number of the first batch.
            state_dict: of the position there; None to consume the batches before it.
            seed: of the workers.
            per_step: see `IterableDatasetFetcher.batches`.
        """
        fetcher.start.share_memory_()  # type: ignore[no-untyped-call]
        fetcher.begin(epoch, start, state_dict)
        if state_dict is not None:
            self.close()  # running workers do not know it
        set_epoch(fetcher.options.data, epoch)  # where workers share it, before they start
        found = self._start(fetcher, seed)
        if fetcher.stateful:
            found = (batch for batch, state in found if fetcher.loader_state.update(state))
        return skip_batches(found, start, per_step) if state_dict is None else found

    def _start(self, dataset: Any, seed: int, **sampler: Any) -> Iterator[Batch]:
        loader = self.loader
        if loader is None or not loader.persistent_workers:
            # a generator of its own, so that starting workers does not advance the global one
            loader = DataLoader(
                dataset, batch_size=None, collate_fn=_identity, generator=torch.Generator(), **sampler, **self.options
            )
            self.loader = loader
        loader.generator.manual_seed(seed)
        batches = iterate_ignoring_signals(loader)
        defer_worker_errors(batches)
        self.running.add(batches)
        return self._until_error(batches, self.num_closed)

    def _until_error(self, batches: Any, num_closed: int) -> Iterator[Any]:
        """The batches; an error shuts the workers down at once, since its traceback keeps the loader alive."""
        try:
            yield from _fetch(batches)
            if self.num_closed != num_closed:
                raise DataError("The source was closed while this epoch was read. Close it when all is read.")
        except Exception as error:
            # a worker that ends while it sends a batch shows as a broken connection
            broken = isinstance(error, (ConnectionError, EOFError, FileNotFoundError)) or "DataLoader worker" in str(error)
            exits = _describe_exits(batches._workers) if broken else ""
            _shut_down(batches)
            self.loader = None
            if exits:
                raise WorkerError(
                    f"A DataLoader worker ended: {exits}. If no user or program killed it, the system did, because memory was "
                    "short: use fewer workers, or a smaller prefetch factor. Without workers the data's own errors are shown."
                ) from error
            raise
        finally:
            if not self.options.get("persistent_workers"):
                _shut_down(batches)


def _fetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; torch's errors about dead workers are raised here alone."""
    while True:
        with worker_errors():
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


def _shut_down(batches: Any) -> None:
    if hasattr(batches, "_shutdown_workers"):  # not where this process fetches itself
        batches._shutdown_workers()
        forget_worker_errors(batches)


def _describe_exits(workers: Iterable[Any]) -> str:
    """How those processes that ended by themselves did so."""
    found = []
    for process in workers:
        process.join(0.5)
        if process.exitcode:
            code = process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
            found.append(f"process {process.pid} {how}")
    return ", ".join(found)


def _identity(batch: Batch) -> Batch:
    return batch
