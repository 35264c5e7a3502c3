"""From indices to batches, in this process or in workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count, islice
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

from fts.errors import DataError
from fts.loops.order import Indices, announce_epoch
from fts.loops.reading import Collate, Reading
from fts.randomness import DATA, fold, seed_generators
from fts.typing import Batch

Request: TypeAlias = tuple[int, int | None, Indices]
"""(epoch, seed of the fetch or None where nothing can draw, indices)."""


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
        epoch, seed, indices = request
        if epoch != self.epoch:  # also in a worker, whose copy of the dataset nobody else can reach
            announce_epoch(self.dataset, epoch)
            self.epoch = epoch
        if seed is not None:
            seed_generators(seed)
        items = self._items(indices)
        return items if self.collate is None else self.collate(items)

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

    Args:
        reading: names iterable data.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        # a tensor, because in shared memory workers that live for several epochs see it change
        self.epoch = torch.zeros((), dtype=torch.int64)

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(int(self.epoch))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; the first `start` are consumed, but neither collated nor yielded."""
        data, size, seed = self.reading.data, self.reading.batch_size, self.reading.seed
        collate, drop_last = self.reading.collate, self.reading.drop_last
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        announce_epoch(data, epoch)
        seed_generators(fold(seed, DATA, epoch, first))
        items = iter(data)
        for number in count():
            seed_generators(fold(seed, DATA, epoch, first + number * stride))
            found = list(islice(items, size or 1))
            if not found or (drop_last and len(found) < (size or 1)):
                if number <= start - self.reading.micro_batches:
                    raise too_short(start, number)
                return
            if number >= start:
                batch = found if size else found[0]
                yield batch if collate is None else collate(batch)


def skip(batches: Iterator[Batch], start: int, micro_batches: int) -> Iterator[Batch]:
    """Consume `start` batches of which the last `micro_batches - 1` may be missing, and give the rest."""
    for number in range(start):
        if next(batches, _END) is _END:
            if number <= start - micro_batches:
                raise too_short(start, number)
            return
    yield from batches


_END = object()


def too_short(start: int, found: int) -> DataError:
    """The error for an epoch that cannot be resumed because it has only `found` batches."""
    return DataError(
        f"The data cannot be resumed at batch {start}: the epoch has {found} batches. The data or the batch size differs from "
        "that of the run which is to be continued."
    )


def row_batches(tensors: tuple[Tensor, ...], order: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """What the default collate function makes of a TensorDataset's items, with one indexing operation a tensor."""
    for indices in order:
        yield [tensor.index_select(0, indices if tensor.is_cpu else indices.to(tensor.device)) for tensor in tensors]


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


@attrs.define
class Workers:
    """Runs a `Fetcher` or `Stream` in a DataLoader's workers, which may live for several epochs.

    Attributes:
        options: arguments of `torch.utils.data.DataLoader`, such as `num_workers`.
        plan: what the present epoch asks for. It must not lead back here: a loader that is part of a cycle is collected
            after its queues, and then its workers are waited for in vain.
        loader: made at the first epoch.
    """

    options: dict[str, Any]
    plan: Plan = attrs.field(factory=Plan)
    loader: DataLoader[Any] | None = None

    def fetch(self, fetcher: Fetcher, requests: Iterable[Request], seed: int) -> Iterator[Batch]:
        """Fetch each request, in order."""
        self.plan.requests = requests
        return self._start(fetcher, seed, sampler=self.plan)

    def stream(self, stream: Stream, epoch: int, seed: int) -> Iterator[Batch]:
        """The batches of an epoch, taken from the workers in turn."""
        stream.epoch.share_memory_()  # type: ignore[no-untyped-call]
        stream.epoch.fill_(epoch)
        announce_epoch(stream.reading.data, epoch)  # where workers share it, before they start
        return self._start(stream, seed)

    def _start(self, dataset: Any, seed: int, **sampler: Any) -> Iterator[Batch]:
        loader = self.loader
        if loader is None or not loader.persistent_workers:
            # a generator of its own, so that starting workers does not move the global one
            loader = DataLoader(
                dataset, batch_size=None, collate_fn=_same, generator=torch.Generator(), **sampler, **self.options
            )
            self.loader = loader
        loader.generator.manual_seed(seed)
        return iter(loader)


def _same(batch: Batch) -> Batch:
    return batch
