"""Sources: any kind of data as numbered epochs of numbered batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import attrs
from torch import Tensor

from fts.loops.dataloader_state import DataLoaderState, StateDict, worker_states_of
from fts.loops.fetcher import epoch_too_short
from fts.loops.position import Position
from fts.loops.sampling import Order
from fts.loops.shards import UNSHARDED, Shard, batched
from fts.loops.worker_pool import WorkerPool
from fts.steps.microbatches import MicroBatches
from fts.typing import Batch


@attrs.frozen
class Source:
    """Data as epochs of batches; made by `source`.

    Attributes:
        batches: `(epoch, start)` -> the loader's batches of that epoch from number `start` on; it also accepts a `state_dict`
            where there is a loader state, and a `shard`.
        batches_per_epoch: how many of those an epoch has; None where the data has no length.
        num_examples: how many examples an epoch visits; None where the data has no length.
        batch_size: examples in one of those batches; None where the data has ready batches.
        micro_batches: how many of them make the batch of one step.
        kind: what the data is, in words.
        stream_workers: how many workers divide a stream, each making batches of its part; otherwise 1.
        order: `(epoch, start)` -> the indices of each loader's batch from number `start` on; None where examples have none.
        loader_state: where a stream's iteration is; None where the data keeps no state.
        resume_from: the position of a state dict, and the state dict, if one was given.
        shard: which of the data's batches this process takes. Then all of the above but `num_examples` and `stream_workers` are
            of this shard.
        sharded_by: what has sharded the data over processes already; empty if nothing known has.
        workers: the DataLoader's workers; None where this process fetches itself.
    """

    batches: Callable[..., Iterator[Batch]] = attrs.field(repr=False)
    batches_per_epoch: int | None = None
    num_examples: int | None = None
    batch_size: int | None = None
    micro_batches: int = 1
    kind: str = "data"
    stream_workers: int = 1
    order: Order | None = attrs.field(default=None, repr=False)
    loader_state: DataLoaderState | None = attrs.field(default=None, repr=False)
    resume_from: tuple[Position, StateDict] | None = attrs.field(default=None, repr=False)
    shard: Shard = UNSHARDED
    sharded_by: str = ""
    workers: WorkerPool | None = attrs.field(default=None, repr=False)

    @property
    def steps_per_epoch(self) -> int | None:
        """How many steps an epoch has; None where the data has no length."""
        return None if self.batches_per_epoch is None else -(-self.batches_per_epoch // self.micro_batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Args:
            epoch: from 0.
            start: how many of the steps' batches to skip.

        Returns:
            An iterator of batches, each a `MicroBatches` if several make one step.

        Raises:
            DataError: the epoch is shorter than `start`, or the data can be iterated only once and was.

        >>> from fts import loops
        >>> list(loops.source([10, 11, 12]).epoch(0, start=1))
        [11, 12]
        """
        steps = self.steps_per_epoch
        if steps is not None and start > steps:
            raise epoch_too_short(start, steps)
        resumes = self.resume_from is not None and self.resume_from[0] == Position(epoch, start)
        state_dict = self.resume_from[1] if self.resume_from is not None and resumes else None
        found = self.batches(epoch, start * self.micro_batches, **({} if state_dict is None else {"state_dict": state_dict}))
        return found if self.micro_batches == 1 else map(MicroBatches, batched(found, self.micro_batches))

    def state_dict(self, position: Position) -> StateDict | None:
        """Where a stream is: what `with_state_dict` begins at without reading the skipped examples.

        Args:
            position: of the next batch; it must be where the iteration of this source is, as when `loops.fit` saves.

        Returns:
            JSON-serializable, to keep as `save_checkpoint(..., extra={"data": ...})`; None where the data keeps no state, where
            its state does not determine what comes next, or where the iteration is elsewhere.

        >>> from fts import loops
        >>> loops.source([1, 2]).state_dict(Position()) is None
        True
        """
        if self.loader_state is None:
            return None
        return self.loader_state.state_dict(position.epoch, position.batch, self.micro_batches * self.shard.stride)

    def with_state_dict(self, position: Position, state_dict: StateDict | None) -> Source:
        """The same source, whose iteration from a position on begins at a state dict.

        Args:
            position: of the state dict, in batches of this source.
            state_dict: what the method `state_dict` returned; None to read the skipped examples.

        Raises:
            CheckpointError: the state dict is corrupt.
        """
        if state_dict is None or self.loader_state is None:
            return self
        worker_states_of(state_dict)
        if len(state_dict["readers"]) != self.loader_state.num_workers:
            return self
        return attrs.evolve(self, resume_from=(position, state_dict))

    def example_indices(self, epoch: int, batch: int) -> list[Any] | None:
        """The indices of the examples in a step's batch, without reading them.

        Args:
            epoch: from 0.
            batch: which of the steps' batches, from 0.

        Returns:
            The indices; None where the examples have none, as in a stream.

        >>> from fts import loops
        >>> loops.source(list(range(10)), batch_size=2, micro_batches=2).example_indices(epoch=0, batch=1)
        [4, 5, 6, 7]
        """
        if self.order is None:
            return None
        found = islice(self.order(epoch, batch * self.micro_batches), self.micro_batches)
        parts = [part.tolist() if isinstance(part, Tensor) else part for part in found]
        return [index for part in parts for index in (part if isinstance(part, (list, tuple)) else [part])]

    def close(self) -> None:
        """Shut the workers down, also persistent ones; the next epoch starts others.

        A source that is not closed does so when it is garbage-collected, which may take 5 s for each worker.

        >>> from fts import loops
        >>> loops.source(list(range(4)), batch_size=2).close()
        """
        if self.workers is not None:
            self.workers.close()

    def describe_empty(self, epoch: int) -> str:
        """An error message for an epoch without a batch."""
        examples = "an unknown number of" if self.num_examples is None else self.num_examples
        size = "" if self.batch_size is None else f" and batches of {self.batch_size}"
        return (
            f"Epoch {epoch} of the data has no batch: it is {self.kind} with {examples} examples{size}. Give data that is not "
            "empty; with drop_last=True there must be at least one full batch, and an iterator inside a dataset is good for one "
            "epoch only."
        )
