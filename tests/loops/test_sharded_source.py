"""The shards of a source of several processes; each is simulated, one after the other."""

import threading
from itertools import zip_longest

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from fts import loops
from fts.errors import ArgumentError, DataError
from fts.loops import Position
from fts.steps import MicroBatches, PaddingBatch
from tests.loops.datasets import AugmentedDataset

SIZES = st.integers(1, 4)


class Noted(Dataset):
    """Notes in a file what is read, in whichever process."""

    def __init__(self, count, file):
        self.count, self.file = count, file

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        with open(self.file, "a") as file:
            file.write(f"{int(index)}\n")
        return torch.tensor(index)


class Streamed(IterableDataset):
    def __init__(self, count, known=True):
        self.count, self.known, self.epoch = count, known, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return (torch.tensor([float(100 * self.epoch + i), torch.rand(()).item()]) for i in range(self.count))

    def __len__(self):
        if not self.known:
            raise TypeError("unknown")
        return self.count


def micro(batch):
    return batch if isinstance(batch, MicroBatches) else [batch]


def collect(sources, epoch, start=0):
    """The steps of all processes, each as one process would have it; and how many copies without weight each had."""
    epochs = [list(source.epoch(epoch, start)) for source in sources]
    steps, copies = [], 0
    for parts in zip_longest(*epochs):
        columns = list(zip_longest(*map(micro, parts)))
        assert all(part is not None for column in columns for part in column), "processes out of step"
        every = [part for column in columns for part in column]
        counted = [part for part in every if not isinstance(part, PaddingBatch)]
        assert counted == every[: len(counted)], "a copy before a batch"
        copies += len(every) - len(counted)
        steps.append(counted)
    return steps, copies


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert [batch.tolist() for batch in one] == [batch.tolist() for batch in micro(other)]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 23),
    batch=SIZES,
    accumulate=SIZES,
    size=SIZES,
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    kind=st.sampled_from([AugmentedDataset, Streamed, lambda count: Streamed(count, known=False)]),
    start=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_processes_do_what_one_does(count, batch, accumulate, size, shuffle, drop_last, kind, start, epoch):
    how = {"batch_size": batch, "drop_last": drop_last, "seed": 3}
    data = kind(count)
    if isinstance(data, AugmentedDataset):
        how["shuffle"] = shuffle
    one = loops.source(data, micro_batches=accumulate * size, **how)
    full = loops.source(data, micro_batches=accumulate, **how)
    parts = [loops.shard_source(full, rank, size) for rank in range(size)]
    assert {part.steps_per_epoch for part in parts} == {one.steps_per_epoch}
    assert {part.num_examples for part in parts} == {one.num_examples}
    start = min(start, one.steps_per_epoch or 0)
    expected = list(one.epoch(epoch, start))
    steps, copies = collect(parts, epoch, start)
    same(steps, expected)
    assert copies < size
    if one.order is not None:
        for number in range(start, start + len(expected)):
            found = [index for part in parts for index in part.example_indices(epoch, number)]
            assert sorted(found) == sorted(one.example_indices(epoch, number))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_process_reads_its_own_examples_alone(workers, tmp_path):
    for rank in range(3):
        file = tmp_path / str(rank)
        data = Noted(23, file)
        part = loops.shard_source(loops.source(data, batch_size=4, shuffle=True, workers=workers), rank, 3)
        own = {index for step in range(part.steps_per_epoch) for index in part.example_indices(1, step)}
        assert len(list(part.epoch(1))) == 2
        assert set(map(int, file.read_text().split())) == own


def test_a_process_without_a_batch_copies_its_own_last_one_or_the_first_of_the_epoch():
    data = AugmentedDataset(5)
    part = loops.shard_source(loops.source(data, batch_size=2), 1, 2)
    second, copy = part.epoch(0)
    assert isinstance(copy, PaddingBatch) and torch.equal(copy.batch, second) and set(data.reads) == {2, 3}
    assert torch.equal(next(part.epoch(0, start=1)).batch, second)
    (only,) = loops.shard_source(loops.source(data, batch_size=5), 3, 4).epoch(0)
    assert isinstance(only, PaddingBatch) and only.batch[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_tensor_datasets_are_split_without_fetching_examples():
    full = loops.source(TensorDataset(torch.arange(10)), batch_size=4)
    first, copy = loops.shard_source(full, 1, 2).epoch(0)
    assert first[0].tolist() == [4, 5, 6, 7] and copy.batch[0].tolist() == [4, 5, 6, 7]


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 30), rows=st.integers(1, 3), size=st.integers(2, 4), stream=st.booleans(), accumulate=st.integers(1, 2)
)
def test_batches_that_are_split(count, rows, size, stream, accumulate):
    data = Streamed(count) if stream else AugmentedDataset(count)
    full = loops.source(data, batch_size=rows * size, micro_batches=accumulate)
    parts = [loops.shard_source(full, rank, size, split_batches=True) for rank in range(size)]
    assert {(part.batch_size, part.steps_per_epoch) for part in parts} == {(rows, full.steps_per_epoch)}
    found = [[micro(batch) for batch in part.epoch(0)] for part in parts]
    for number, expected in enumerate(full.epoch(0)):
        for place, batch in enumerate(micro(expected)):
            shares = [part[number][place] for part in found]
            counted = [share for share in shares if not isinstance(share, PaddingBatch)]
            assert torch.cat(counted)[:, 0].tolist() == batch[:, 0].tolist()
        if not stream:
            indices = [index for part in parts for index in part.example_indices(0, number)]
            assert sorted(indices) == sorted(full.example_indices(0, number))


def test_ready_batches_are_split_by_examples():
    batches = [{"x": torch.arange(6)}, {"x": torch.arange(1)}]
    one, two = (list(loops.shard_source(loops.source(batches), rank, 2, split_batches=True).epoch(0)) for rank in range(2))
    assert [batch["x"].tolist() for batch in one] == [[0, 1, 2], [0]]
    assert two[0]["x"].tolist() == [3, 4, 5] and isinstance(two[1], PaddingBatch)


def test_batch_samplers_are_sharded():
    loader = DataLoader(AugmentedDataset(9), batch_sampler=[[0, 1, 2], [3], [4, 5], [6, 7, 8]])
    steps, _ = collect([loops.shard_source(loops.source(loader), rank, 3) for rank in range(3)], 0)
    assert [[batch[:, 0].tolist() for batch in step] for step in steps] == [[[0, 1, 2], [3], [4, 5]], [[6, 7, 8]]]


class Remembering(IterableDataset):
    """A stream that can say where it is."""

    def __init__(self, count):
        self.count, self.at, self.reads = count, 0, 0

    def __iter__(self):
        while self.at < self.count:
            self.at += 1
            self.reads += 1
            yield torch.tensor(self.at - 1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sharded_stream_resumes_at_its_state(rank):
    full = loops.shard_source(loops.source(Remembering(23), batch_size=2, micro_batches=2), rank, 2)
    expected = [list(micro(step)) for step in full.epoch(0)]
    running = full.epoch(0)
    next(running)
    state_dict = full.state_dict(Position(0, 1))
    assert state_dict is not None
    data = Remembering(23)
    resumed = loops.shard_source(loops.source(data, batch_size=2, micro_batches=2), rank, 2).with_state_dict(
        Position(0, 1), state_dict
    )
    rest = list(resumed.epoch(0, start=1))
    assert repr(rest) == repr([MicroBatches(step) for step in expected[1:]])
    assert data.reads == 23 - 8


class SimulatedGroup:
    """A group of threads that scatter by hand."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size)

    def member(self, rank):
        group = self

        class Member:
            is_main_process = rank == 0

            @staticmethod
            def scatter_object(values):
                if rank == 0:
                    group.slots[:] = values
                group.barrier.wait(10)
                found = group.slots[rank]
                group.barrier.wait(10)
                return found

        return Member()


def run(size, work):
    """Each process's result, or its error, of processes that are threads."""
    group, found = SimulatedGroup(size), [None] * size

    def begin(rank):
        try:
            found[rank] = work(rank, group.member(rank))
        except Exception as error:  # noqa: BLE001  # tests look at it
            found[rank] = error

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


@pytest.mark.parametrize("count", [1, 12, 13, 23])
@pytest.mark.parametrize("split_batches", [False, True])
def test_the_first_process_reads_for_all(count, split_batches):
    data = [Streamed(count, known=False) for _ in range(3)]

    def work(rank, group, dispatch=True):
        full = loops.source(data[rank if dispatch else 0], batch_size=6, micro_batches=2)
        part = loops.shard_source(full, rank, 3, dispatch=dispatch, group=group, split_batches=split_batches)
        return list(part.epoch(0)), list(part.epoch(1))

    expected = [work(rank, None, dispatch=False) for rank in range(3)]
    if not split_batches:
        data[1].count = data[2].count = 0
    assert repr([found[0] for found in run(3, work)]) == repr([found[0] for found in expected])


def test_all_processes_hear_of_an_error_of_the_one_that_reads():
    def broken():
        yield torch.zeros(1)
        raise OSError("disk gone")

    found = run(
        2, lambda rank, group: list(loops.shard_source(loops.source(broken()), rank, 2, dispatch=True, group=group).epoch(0))
    )
    assert isinstance(found[0], OSError)
    assert isinstance(found[1], DataError) and "disk gone" in str(found[1])


def test_what_cannot_be_sharded():
    full = loops.source([1, 2, 3])
    with pytest.raises(ArgumentError, match="ranks go from 0"):
        loops.shard_source(full, 2, 2)
    with pytest.raises(ArgumentError, match="is sharded over 2 processes already"):
        loops.shard_source(loops.shard_source(full, 0, 2), 0, 2)
    with pytest.raises(ArgumentError, match="must be a multiple"):
        loops.shard_source(loops.source(range(9), batch_size=3), 0, 2, split_batches=True)
    with pytest.raises(ArgumentError, match="there are 1"):
        list(loops.shard_source(full, 0, 2, dispatch=True).epoch(0))
    assert loops.shard_source(full, 0, 1) is full


@pytest.mark.parametrize("sampled", ["examples", "batches", "in its own way"])
def test_data_that_a_sampler_has_sharded_is_an_error(sampled):
    class Own(DataLoader):
        def __iter__(self):
            return iter([1])

    class OwnBatches(BatchSampler):
        pass

    data = list(range(8))
    sampler = DistributedSampler(data, num_replicas=2, rank=1)
    divided = {
        "examples": lambda: DataLoader(data, batch_size=2, sampler=sampler),
        "batches": lambda: DataLoader(data, batch_sampler=OwnBatches(sampler, 2, False)),
        "in its own way": lambda: Own(data, batch_size=2, sampler=sampler),
    }[sampled]()
    source = loops.source(divided)
    assert loops.shard_source(source, 0, 1) is source
    with pytest.raises(DataError, match="by its DistributedSampler, and would be sharded twice"):
        loops.shard_source(source, 1, 2)


def test_a_loader_of_accelerate_is_an_error_where_it_has_sharded_the_data():
    shards = pytest.importorskip("accelerate.data_loader")
    batches = BatchSampler(range(8), 2, False)
    with pytest.raises(DataError, match="accelerate's BatchSamplerShard"):
        loops.shard_source(loops.source(DataLoader(range(8), batch_sampler=shards.BatchSamplerShard(batches, 2, 1))), 1, 2)
    full = shards.BatchSamplerShard(batches, 1, 0)
    assert loops.shard_source(loops.source(DataLoader(range(8), batch_sampler=full)), 1, 2).shard.world_size == 2


def test_data_that_is_split_by_node_is_an_error():
    datasets = pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    stream = datasets.Dataset.from_dict({"x": list(range(8))}).to_iterable_dataset(num_shards=2)
    divided = split_dataset_by_node(stream, rank=1, world_size=2)
    assert len(list(loops.shard_source(loops.source(stream, batch_size=2), 1, 2).epoch(0))) == 2
    with pytest.raises(DataError, match="split_dataset_by_node"):
        loops.shard_source(loops.source(divided, batch_size=2), 1, 2)
    with pytest.raises(DataError, match="split_dataset_by_node"):
        loops.shard_source(loops.source(DataLoader(divided, batch_size=2)), 1, 2)
