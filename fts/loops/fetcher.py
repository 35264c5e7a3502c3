"""Datasets whose elements are collated and seeded batches, for this process or for workers, as torch's dataset fetchers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate, default_convert, get_worker_info

from fts.errors import DataError
from fts.loops.dataloader_state import (
    DataLoaderState,
    StateDict,
    WorkerState,
    capture_state,
    idle_state,
    incomplete_state_reason,
    is_stateful,
    isolate,
    restore_state,
    worker_states_of,
)
from fts.loops.loader_options import Collate, LoaderOptions
from fts.loops.sampling import Indices, set_epoch
from fts.loops.shards import BatchIndices
from fts.randomness import DATA, fold_in, seed_generators
from fts.steps.microbatches import PaddingBatch
from fts.typing import Batch

logger = logging.getLogger(__name__)

Request: TypeAlias = tuple[int, int | None, Indices, bool]
"""(epoch, seed of the fetch or None where nothing uses random numbers, indices, whether the batch is a `PaddingBatch`)."""


class MapDatasetFetcher(Dataset[Batch]):
    """A dataset whose elements are batches: a request in, a seeded and collated batch out.

    Args:
        dataset: map-style.
        collate: called with a list of examples, or with one example where a fetch asks for one; None leaves them as they are.
        batched: whether requests hold several indices.
    """

    def __init__(self, dataset: Any, collate: Collate | None, batched: bool) -> None:
        self.dataset = dataset
        self.collate = collate
        self.batched = batched
        self.epoch = -1

    def __getitem__(self, request: Request) -> Batch:
        epoch, seed, indices, is_padding = request
        if epoch != self.epoch:  # also in a worker, which has a copy of the dataset
            set_epoch(self.dataset, epoch)
            self.epoch = epoch
        if seed is not None:
            seed_generators(seed)
        examples = self._examples(indices)
        batch = examples if self.collate is None else self.collate(examples)
        return PaddingBatch(batch) if is_padding else batch

    def _examples(self, indices: Indices) -> Any:
        if not self.batched:
            return self.dataset[indices]
        chosen = indices.tolist() if isinstance(indices, Tensor) else indices
        get_many = getattr(self.dataset, "__getitems__", None)
        return get_many(chosen) if callable(get_many) else [self.dataset[index] for index in chosen]


class IterableDatasetFetcher(IterableDataset[Batch]):
    """An iterable dataset whose elements are seeded and collated batches.

    Each worker has its part of the stream, as in torch: its batch `i`, if it is worker `w` of `k`, is seeded as number
    `i * k + w`, which is its number in the epoch as long as no worker has run out.

    Where the data has `state_dict` and `load_state_dict`, each batch comes with the state that the data has after it.

    Args:
        options: with iterable data.
    """

    def __init__(self, options: LoaderOptions) -> None:
        self.options = options
        reason = incomplete_state_reason(options.data)
        self.stateful = is_stateful(options.data) and not isinstance(options.data, Iterator) and not reason
        num_workers = max(1, options.dataloader_kwargs.get("num_workers", 0))
        # the data itself is read for several epochs, or copies of it in persistent workers
        persistent = not options.dataloader_kwargs or bool(options.dataloader_kwargs.get("persistent_workers"))
        self.loader_state = DataLoaderState(num_workers, persistent, f"a {type(options.data).__name__}", reason)
        self.worker_states: list[WorkerState] = []
        self.next_worker = 0
        # the epoch, and whether it begins at the worker states: a tensor, because in shared memory persistent workers see it
        # change
        self.start = torch.zeros(2, dtype=torch.int64)

    def __iter__(self) -> Iterator[Any]:
        """What a worker yields: batches, or pairs of a batch and its worker state."""
        worker = get_worker_info()
        worker_id, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, resumes = self.start.tolist()
        state = next((one for one in self.worker_states if one.worker_id == worker_id), None) if resumes else None
        batches = self._rewound(self._generate(epoch, worker_id, num_workers, 0 if state is None else state.num_yielded, state))
        if not self.stateful:
            return (batch for batch, _ in batches)
        # the loader asks worker 0 first: the workers before the next one yield nothing once
        pause = [(None, state._replace(empty=True))] if state is not None and worker_id < self.next_worker else []
        return chain(pause, batches)

    def batches(self, epoch: int, start: int = 0, state_dict: StateDict | None = None, per_step: int = 1) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, read in this process; without a state dict, the others are consumed.

        Of those, the last `per_step - 1` may be missing.
        """
        state = next(iter(self.begin(epoch, start, state_dict)), None)
        for batch, after in self._rewound(self._generate(epoch, 0, 1, start, state, per_step)):
            if not self.stateful or self.loader_state.update(after):
                yield batch

    def begin(self, epoch: int, start: int, state_dict: StateDict | None) -> list[WorkerState]:
        """Set where the next iteration begins: at batch `start`, if there is a state dict."""
        self.worker_states, self.next_worker = ([], 0) if state_dict is None else worker_states_of(state_dict)
        if self.loader_state.num_workers == 1:  # in batches of this run's size
            self.worker_states = [one._replace(num_yielded=start) for one in self.worker_states]
        self.start[0], self.start[1] = epoch, state_dict is not None
        self.loader_state.begin(epoch, start if state_dict is not None else 0, self.worker_states, self.next_worker)
        return self.worker_states

    def _rewound(self, batches: Iterator[tuple[Batch, WorkerState]]) -> Iterator[tuple[Batch, WorkerState]]:
        """The same batches; if the iteration is left before its end, the data's state is reset to the one before it."""
        before = idle_state(self.options.data) if self.stateful else None
        try:
            yield from batches
            before = None
        finally:
            if before is not None:
                self.options.data.load_state_dict(before)

    def _generate(
        self, epoch: int, worker_id: int, num_workers: int, start: int, state: WorkerState | None, per_step: int = 1
    ) -> Iterator[tuple[Batch, WorkerState]]:
        """A worker's batches from its number `start` on, each with the worker's state after it."""
        size, seed, collate = self.options.batch_size, self.options.seed, self.options.collate
        set_epoch(self.options.data, epoch)
        data = isolate(self.options.data)
        if state is not None:
            restore_state(data, state)
        seed_generators(fold_in(seed, DATA, epoch, worker_id))
        ended = state is not None and state.ended
        examples = iter(()) if ended else iter(data)
        for number in count(0 if state is None else start):
            seed_generators(fold_in(seed, DATA, epoch, worker_id + number * num_workers))
            try:
                found = list(islice(examples, size or 1))
            except Exception as error:
                if state is None or number > start or data is self.options.data:
                    raise
                # `datasets` cannot load some states in a worker; the copy that failed is dropped
                kind = self.loader_state.kind
                logger.warning("Skipped examples are read again, because %s does not load its state: %r", kind, error)
                yield from self._generate(epoch, worker_id, num_workers, start, None, per_step)
                return
            short = len(found) < (size or 1)
            if not found or (short and self.options.drop_last):
                if state is None and number <= start - per_step:
                    raise epoch_too_short(start, number)
                if self.stateful:
                    yield None, capture_state(data, worker_id, number, ended=True, empty=True)
                return
            after = capture_state(data, worker_id, number + 1, ended=short) if self.stateful else _NO_STATE
            if state is None and number < start:
                self.loader_state.update(after)
                continue
            batch = found if size else found[0]
            yield batch if collate is None else collate(batch), after


_NO_STATE = WorkerState(0)


def skip_batches(batches: Iterator[Batch], start: int, per_step: int) -> Iterator[Batch]:
    """Consume `start` batches of which the last `per_step - 1` may be missing, and yield the rest."""
    for number in range(start):
        if next(batches, _END) is _END:
            if number <= start - per_step:
                raise epoch_too_short(start, number)
            return
    yield from batches


_END = object()


def epoch_too_short(start: int, found: int) -> DataError:
    """The error for an epoch that cannot be resumed because it has only `found` batches."""
    return DataError(
        f"The data cannot be resumed at batch {start}: the epoch has {found} batches. The data, the batch size, the "
        "micro-batches of a step or the number of processes differ from those of the run that is resumed."
    )


def tensor_dataset_batches(tensors: tuple[Tensor, ...], requests: Iterable[BatchIndices]) -> Iterator[Batch]:
    """What the default collate function makes of a TensorDataset's examples, with one indexing operation per tensor."""
    for _, indices, is_padding in requests:
        batch = [tensor.index_select(0, indices if tensor.is_cpu else indices.to(tensor.device)) for tensor in tensors]
        yield PaddingBatch(batch) if is_padding else batch


def is_plain_tensor_dataset(dataset: Any, collate: Collate | None) -> bool:
    """Whether `tensor_dataset_batches` gives what fetching and collating one example after the other would."""
    return (
        type(dataset) is TensorDataset
        and collate is default_collate
        and all(type(tensor) is Tensor and tensor.layout == torch.strided for tensor in dataset.tensors)
    )


def may_use_randomness(dataset: Any, collate: Collate | None) -> bool:
    """Whether a fetch may use random numbers, as far as the types of dataset and collate function show."""
    return type(dataset) not in (list, tuple, range, TensorDataset) or collate not in (None, default_collate, default_convert)
