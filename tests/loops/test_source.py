import gc
import multiprocessing
import random
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fts.errors import ArgumentError, DataError
from fts.loops import source
from fts.loops.loader_options import dataloader_kwargs
from fts.loops.sampling import EpochSampler, permutation
from fts.randomness import DATA, fold_in, seed_generators
from fts.steps import MicroBatches
from tests.loops.datasets import AugmentedDataset, GetItemsDataset, NumberStream, RecordingDataset, to_lists


def randperm(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def chunks(values, size, drop_last=False):
    found = [values[i : i + size] for i in range(0, len(values), size)]
    return [chunk for chunk in found if not drop_last or len(chunk) == size]


@given(
    count=st.integers(1, 50), size=st.integers(1, 9), seed=st.integers(-5, 5), epoch=st.integers(0, 3), drop_last=st.booleans(),
    start=st.integers(0, 9),
)  # fmt: skip
def test_shuffled_order_is_torch_randperm_seeded_with_seed_plus_epoch(count, size, seed, epoch, drop_last, start):
    data = RecordingDataset(count)
    found = source(data, batch_size=size, shuffle=True, seed=seed, drop_last=drop_last)
    expected = chunks([float(i) for i in randperm(count, seed + epoch)], size, drop_last)
    assert found.steps_per_epoch == len(expected)
    assert found.num_examples == count
    if start > len(expected):
        with pytest.raises(DataError, match="cannot be resumed"):
            found.epoch(epoch, start)
    else:
        assert to_lists(found.epoch(epoch, start)) == expected[start:]
        assert data.reads == [int(i) for chunk in expected[start:] for i in chunk]


@pytest.mark.parametrize("count", [5, 64, 5000])
def test_long_epochs_are_split_into_the_same_batches(count):
    data = TensorDataset(torch.arange(count))
    assert to_lists(source(data, batch_size=2).epoch(0)) == [[chunk] for chunk in chunks(list(range(count)), 2)]
    assert to_lists(source(data, batch_size=2).epoch(0, start=2)) == [[chunk] for chunk in chunks(list(range(count)), 2)[2:]]


@given(size=st.integers(1, 7), shuffle=st.booleans(), drop_last=st.booleans(), start=st.integers(0, 1))
def test_examples_of_a_tensor_dataset_equal_the_default_collate(size, shuffle, drop_last, start):
    data = TensorDataset(torch.randn(11, 3), torch.arange(11), torch.rand(11) > 0.5, torch.randn(2, 11, 2).transpose(0, 1))

    class Plain(Dataset):  # the same examples, fetched one by one
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            return data[index]

    options = {"batch_size": size, "shuffle": shuffle, "drop_last": drop_last, "seed": 3}
    fast, plain = (list(source(kind, **options).epoch(1, start)) for kind in (data, Plain()))
    assert len(fast) == len(plain)
    for left, right in zip(fast, plain, strict=True):
        assert type(left) is type(right) is list
        for a, b in zip(left, right, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_batch_of_a_tensor_dataset_is_a_copy():
    data = TensorDataset(torch.zeros(4))
    for (batch,) in source(data, batch_size=2).epoch(0):
        batch.add_(1)
    assert data.tensors[0].tolist() == [0, 0, 0, 0]


# -- arguments that would do nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"shuffle": True}, {"sampler": [1, 0]}])
def test_an_iterator_has_its_own_order(options):
    with pytest.raises(DataError, match=f"{next(iter(options))}.*iterator.*list"):
        source(iter([1, 2]), batch_size=1, **options)


def test_a_sampler_needs_examples_with_indices():
    with pytest.raises(DataError, match=r"sampler.*NumberStream.*__getitem__"):
        source(NumberStream(5), batch_size=2, sampler=[1, 0])
    with pytest.raises(DataError, match=r"sampler.*set.*__getitem__"):
        source({1, 2}, batch_size=2, sampler=[1, 0])


@pytest.mark.parametrize("data", [[1, 2], iter([1, 2]), NumberStream(5)])
def test_dropping_the_last_batch_needs_a_batch_size(data):
    with pytest.raises(ArgumentError, match=r"drop_last=True.*batch_size"):
        source(data, drop_last=True)


@pytest.mark.parametrize("seed", [1.5, "0", None, True, 2**63, -(2**63) - 1])
def test_a_seed_is_an_integer(seed):
    for data in (RecordingDataset(4), DataLoader(RecordingDataset(4), batch_size=2)):
        with pytest.raises(ArgumentError, match=r"source\(seed=.*whole number"):
            source(data, seed=seed)


def test_getitems_is_used_where_a_dataset_has_it():
    data = GetItemsDataset(6)
    assert to_lists(source(data, batch_size=4).epoch(0)) == [[0, 1, 2, 3], [4, 5]]
    assert data.calls == 2
    assert to_lists(source(Subset(data, [5, 3, 1]), batch_size=2).epoch(0)) == [[5, 3], [1]]


def test_collate_is_used():
    assert list(source(RecordingDataset(3), batch_size=2, collate=len).epoch(0)) == [2, 1]
    assert list(source([[1, 2], [3]], collate=sum).epoch(0)) == [3, 3]


# -- randomness ---------------------------------------------------------------------------------------------------------


def augmented(indices, seed, epoch, number):
    seed_generators(fold_in(seed, DATA, epoch, number))
    return [[float(i), torch.rand(()).item(), np.random.rand(), random.random()] for i in indices]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_fetch_is_seeded_by_seed_epoch_and_batch(workers):
    found = source(AugmentedDataset(7), batch_size=3, shuffle=True, seed=5, workers=workers)
    for epoch, start in ((0, 0), (2, 1)):
        expected = [augmented(chunk, 5, epoch, b) for b, chunk in enumerate(chunks(randperm(7, 5 + epoch), 3))]
        assert to_lists(found.epoch(epoch, start)) == expected[start:]


def test_collate_is_seeded_too():
    found = source(RecordingDataset(4), batch_size=2, collate=lambda examples: torch.rand(()).item())
    values = list(found.epoch(0))
    assert len(set(values)) == 2
    assert list(found.epoch(0)) == values
    assert list(found.epoch(0, start=1)) == values[1:]


def test_persistent_workers_see_each_epoch():
    class Epochs(RecordingDataset):
        epoch = -1

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __getitem__(self, index):
            return 100 * self.epoch + index

    found = source(Epochs(4), batch_size=2, workers=2, persistent_workers=True)
    for epoch in (0, 1, 3):
        assert to_lists(found.epoch(epoch)) == [[100 * epoch, 100 * epoch + 1], [100 * epoch + 2, 100 * epoch + 3]]
    next(found.epoch(4))  # left in the middle
    assert to_lists(found.epoch(5, start=1)) == [[502, 503]]


def test_fetching_with_workers_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(source(RecordingDataset(3), batch_size=1, workers=1).epoch(0))
    assert torch.equal(torch.rand(3), expected)


# -- other kinds of data ------------------------------------------------------------------------------------------------


class Ready:
    """A re-iterable of ready batches without a length."""

    def __init__(self, count):
        self.count = count
        self.started = 0

    def __iter__(self) -> Iterator[int]:
        self.started += 1
        return iter(range(self.count))


def test_a_list_holds_ready_batches_which_may_be_shuffled():
    batches = [10, 11, 12, 13]
    assert list(source(batches).epoch(3)) == batches
    assert source(batches).steps_per_epoch == 4
    shuffled = source(batches, shuffle=True, seed=1)
    assert list(shuffled.epoch(2, start=1)) == [10 + i for i in randperm(4, 3)][1:]
    assert to_lists(source(batches, batch_size=3).epoch(0)) == [[10, 11, 12], [13]]


def test_a_re_iterable_is_iterated_anew_each_epoch():
    ready = Ready(3)
    found = source(ready)
    assert found.steps_per_epoch is None
    assert [list(found.epoch(0)), list(found.epoch(1, start=2)), list(found.epoch(1, start=3))] == [[0, 1, 2], [2], []]
    assert ready.started == 3
    with pytest.raises(DataError, match="cannot be resumed at batch 5: the epoch has 3"):
        list(found.epoch(0, start=5))


def test_an_iterator_serves_one_epoch():
    found = source(iter([1, 2, 3]))
    assert list(found.epoch(0)) == [1, 2, 3]
    with pytest.raises(DataError, match="only once"):
        found.epoch(1)
    with pytest.raises(DataError, match=r"only once.*list"):
        source(x for x in [1, 2]).epoch(0, start=1)
    with pytest.raises(ArgumentError, match="Workers cannot share an iterator"):
        source(iter([1]), workers=1)


def test_a_map_style_dataset_needs_a_batch_size_and_a_length():
    with pytest.raises(DataError, match=r"RecordingDataset with 3 examples.*batch_size=32"):
        source(RecordingDataset(3))

    class Endless(Dataset):
        def __getitem__(self, index):
            return index

    with pytest.raises(DataError, match="needs __len__"):
        source(Endless(), batch_size=2)


@pytest.mark.parametrize("data", [{"train": [1]}, "text", 3, None])
def test_other_types_of_data_are_errors(data):
    with pytest.raises(DataError, match=type(data).__name__):
        source(data)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"micro_batches": 0}, {"workers": -1}, {"batch_size": 2.5}])
def test_impossible_arguments_are_errors(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        source(RecordingDataset(3), **({"batch_size": 1} | options))


# -- iterable datasets --------------------------------------------------------------------------------------------------


def test_an_iterable_dataset_is_batched_and_its_epoch_set():
    data = NumberStream(5)
    found = source(data, batch_size=2)
    assert (found.steps_per_epoch, found.num_examples) == (None, None)
    assert to_lists(found.epoch(0)) == [[0, 1], [2, 3], [4]]
    assert to_lists(found.epoch(2, start=1)) == [[2002, 2003], [2004]]
    assert data.epochs == [0, 2]
    assert to_lists(source(data, batch_size=2, drop_last=True).epoch(0)) == [[0, 1], [2, 3]]
    with pytest.raises(DataError, match="cannot be resumed at batch 4: the epoch has 3"):
        list(found.epoch(0, start=4))
    with pytest.raises(DataError, match="cannot be shuffled"):
        source(data, batch_size=2, shuffle=True)


def test_a_sized_iterable_dataset_has_its_length():
    assert source(NumberStream(5, sized=True), batch_size=2).steps_per_epoch == 3
    assert source(NumberStream(5, sized=True), batch_size=2).num_examples == 5


def two_workers_since(before):
    workers = [process for process in multiprocessing.active_children() if process not in before]
    assert len(workers) == 2
    return workers


@pytest.mark.parametrize("data", [RecordingDataset(8), NumberStream(8)])
def test_a_source_without_references_has_no_workers(data):
    before = multiprocessing.active_children()
    found = source(data, batch_size=2, workers=2, persistent_workers=True)
    next(found.epoch(0))
    gc.disable()
    try:
        del found
        assert multiprocessing.active_children() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("data", [RecordingDataset(8), NumberStream(8)])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_source_that_is_closed_has_no_workers_and_starts_others(data, persistent):
    before = multiprocessing.active_children()
    found = source(data, batch_size=2, workers=2, persistent_workers=persistent)
    full = [batch.tolist() for batch in found.epoch(0)]
    batches = found.epoch(1)
    next(batches)
    workers = two_workers_since(before)
    found.close()
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(DataError, match="closed while this epoch was read"):
        list(batches)
    assert [batch.tolist() for batch in found.epoch(0)] == full
    found.close()
    found.close()


def test_an_error_in_one_epoch_keeps_the_workers_of_another():
    class Damaged(RecordingDataset):
        def __getitem__(self, index):
            if index == 7:
                raise ValueError("item 7")
            return super().__getitem__(index)

    found = source(Damaged(12), batch_size=2, workers=1)
    one, other = found.epoch(0), found.epoch(0)
    with pytest.raises(ValueError, match="item 7"):
        list(one)
    assert len([next(other), next(other), next(other)]) == 3
    with pytest.raises(ValueError, match="item 7"):
        next(other)
    assert hash(found) == hash(found)


def test_an_epoch_that_is_made_and_not_read_leaves_no_workers():
    before = multiprocessing.active_children()
    found = source(RecordingDataset(8), batch_size=2, workers=2)
    found.epoch(0)
    assert multiprocessing.active_children() == before


def test_leaving_an_epoch_ends_its_workers_though_the_source_is_referenced():
    before = multiprocessing.active_children()
    found = source(RecordingDataset(8), batch_size=2, workers=2)
    batches = found.epoch(0)
    next(batches)
    workers = two_workers_since(before)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("persistent", [False, True])
def test_an_iterable_dataset_is_divided_over_workers(persistent):
    found = source(NumberStream(6), batch_size=2, workers=2, persistent_workers=persistent)
    for epoch in (0, 2):
        k = 1000 * epoch
        expected = [[k, k + 2], [k + 1, k + 3], [k + 4], [k + 5]]
        assert to_lists(found.epoch(epoch)) == expected
        assert to_lists(found.epoch(epoch, start=3)) == expected[3:]
    with pytest.raises(DataError, match="cannot be resumed at batch 5: the epoch has 4"):
        list(found.epoch(0, start=5))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_dataset_that_draws_is_replayed(workers):
    found = source(NumberStream(9, random_examples=True), batch_size=2, workers=workers)
    full = to_lists(found.epoch(1))
    for start in range(len(full) + 1):
        assert to_lists(found.epoch(1, start)) == full[start:]
    assert to_lists(found.epoch(0)) != full


def test_workers_do_not_repeat_an_iterable_that_is_not_divided():
    with pytest.raises(ArgumentError, match="2 times"):
        source(Ready(3), workers=2)
    assert list(source(Ready(3), workers=1).epoch(0)) == [0, 1, 2]


def test_hugging_face_datasets_are_accepted():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": list(range(6))}).with_format("torch")
    found = source(rows, batch_size=4, shuffle=True, seed=2)
    assert to_lists(found.epoch(1)) == [{"x": chunk} for chunk in chunks(randperm(6, 3), 4)]
    with pytest.raises(DataError, match="batch size"):
        source(rows)
    with pytest.raises(DataError, match="DatasetDict"):
        source(datasets.DatasetDict({"train": rows}), batch_size=2)
    stream = rows.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=3)
    found = source(stream, batch_size=2)
    epochs = [to_lists(found.epoch(epoch)) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert to_lists(found.epoch(0)) == epochs[0]
    assert to_lists(found.epoch(1, start=1)) == epochs[1][1:]
    parallel = source(stream, batch_size=2, workers=2)
    seen = [x for batch in to_lists(parallel.epoch(0)) for x in batch["x"]]
    assert sorted(seen) == list(range(6))


# -- DataLoaders --------------------------------------------------------------------------------------------------------


def test_a_loader_gives_its_dataset_batch_size_and_shuffling():
    data = RecordingDataset(7)
    found = source(DataLoader(data, batch_size=3, shuffle=True, drop_last=True), seed=4)
    assert (found.batch_size, found.num_examples, found.steps_per_epoch) == (3, 7, 2)
    assert to_lists(found.epoch(1)) == chunks(randperm(7, 5), 3, drop_last=True)
    data.reads.clear()
    assert to_lists(found.epoch(1, start=1)) == chunks(randperm(7, 5), 3)[1:2]
    assert len(data.reads) == 3


def test_a_sequential_loader_stays_sequential():
    loader = DataLoader(RecordingDataset(5), batch_size=2, collate_fn=len)
    assert list(source(loader).epoch(0)) == [2, 2, 1]
    loader = DataLoader(RecordingDataset(5), batch_size=2)
    assert to_lists(source(loader).epoch(3)) == to_lists(iter(loader)) == [[0, 1], [2, 3], [4]]


def test_a_loader_with_workers_gives_the_same_batches():
    options = {"batch_size": 3, "shuffle": True}
    plain = source(DataLoader(AugmentedDataset(8), **options), seed=1)
    parallel = source(
        DataLoader(AugmentedDataset(8), num_workers=2, persistent_workers=True, prefetch_factor=1, timeout=60, **options), seed=1
    )
    for epoch, start in ((0, 0), (1, 1)):
        assert to_lists(plain.epoch(epoch, start)) == to_lists(parallel.epoch(epoch, start))


def mark(worker):
    import tests.loops.datasets

    tests.loops.datasets.RecordingDataset.__getitem__ = lambda self, index: 100 * (worker + 1) + index


def test_worker_init_fn_and_multiprocessing_context_are_used():
    loader = DataLoader(RecordingDataset(4), batch_size=2, num_workers=2, worker_init_fn=mark, multiprocessing_context="fork")
    assert to_lists(source(loader).epoch(0)) == [[100, 101], [202, 203]]


def test_pinned_memory_costs_nothing_without_an_accelerator(monkeypatch):
    data = TensorDataset(torch.arange(4))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert dataloader_kwargs(0, {"pin_memory": True, "prefetch_factor": None}) == {}
    assert to_lists(source(DataLoader(data, batch_size=2, pin_memory=True)).epoch(0)) == [[[0, 1]], [[2, 3]]]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert dataloader_kwargs(0, {"pin_memory": True}) == {"pin_memory": True}


def test_arguments_about_loading_are_checked():
    with pytest.raises(ArgumentError, match=r"num_workers.*workers"):
        source(RecordingDataset(2), batch_size=1, num_workers=2)
    with pytest.raises(ArgumentError, match="prefetch_factor, which only workers can use"):
        source(RecordingDataset(2), batch_size=1, prefetch_factor=2)


def test_a_sampler_may_be_given_without_a_loader():
    assert to_lists(source(RecordingDataset(6), batch_size=2, sampler=[5, 3, 1]).epoch(0)) == [[5, 3], [1]]
    with pytest.raises(ArgumentError, match="shuffle=True and a sampler"):
        source(RecordingDataset(6), batch_size=2, sampler=[5, 3, 1], shuffle=True)


class Alternating:
    """A sampler with `set_epoch` that draws lazily from the global generators."""

    def __init__(self, count):
        self.count = count
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        for index in range(self.count):
            yield (index * 2 + self.epoch + int(torch.randint(9, ())) + random.randrange(9) + np.random.randint(9)) % self.count


@pytest.mark.parametrize("workers", [0, 2])
def test_a_custom_sampler_is_kept_and_its_indices_skipped_without_reading(workers):
    data = AugmentedDataset(10)
    found = source(DataLoader(data, batch_size=3, sampler=Alternating(10), num_workers=workers), seed=6)
    assert found.steps_per_epoch == 4
    full = {epoch: to_lists(found.epoch(epoch)) for epoch in (0, 1)}
    assert full[0] != full[1]
    for epoch in (0, 1):
        for start in range(5):
            data.reads.clear()
            torch.rand(start)  # what others draw must not matter
            assert to_lists(found.epoch(epoch, start)) == full[epoch][start:]
            assert workers or len(data.reads) == 10 - min(10, 3 * start)


def test_a_custom_sampler_does_not_disturb_the_global_generators():
    found = source(DataLoader(list(range(10)), batch_size=3, sampler=Alternating(10), collate_fn=default_collate), seed=6)
    seed_generators(0)
    expected = torch.rand(()).item(), np.random.rand(), random.random()
    seed_generators(0)
    list(found.epoch(0))
    assert (torch.rand(()).item(), np.random.rand(), random.random()) == expected


@pytest.mark.parametrize(
    "sampler",
    [
        lambda data: RandomSampler(data, replacement=True, num_samples=9),
        lambda data: RandomSampler(data, num_samples=4, generator=torch.Generator()),
        lambda data: WeightedRandomSampler([1.0, 2.0, 3.0, 4.0, 5.0], 8),
        lambda data: SequentialSampler([0, 1, 2]),
        lambda data: [4, -1, 0],
    ],
)
def test_any_sampler_replays(sampler):
    data = RecordingDataset(5)
    found = source(DataLoader(data, batch_size=2, sampler=sampler(data)), seed=2)
    count = len(sampler(data))
    full = to_lists(found.epoch(1))
    assert (found.num_examples, found.steps_per_epoch, len(full)) == (count, -(-count // 2), -(-count // 2))
    for start in range(len(full) + 1):
        assert to_lists(found.epoch(1, start)) == full[start:]


def test_a_custom_batch_sampler_is_kept():
    class Pairs:
        batch_size = 2

        def __len__(self):
            return 3

        def __iter__(self):
            return iter([[0, 5], [1, 4], [2, 3]])

    data = RecordingDataset(6)
    found = source(DataLoader(data, batch_sampler=Pairs()))
    assert (found.batch_size, found.steps_per_epoch) == (2, 3)
    assert to_lists(found.epoch(0, start=1)) == [[1, 4], [2, 3]]
    assert data.reads == [1, 4, 2, 3]


def test_the_standard_batch_sampler_is_understood():
    data = RecordingDataset(7)
    loader = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 3, drop_last=True))
    assert to_lists(source(loader, seed=1).epoch(0)) == chunks(randperm(7, 1), 3, drop_last=True)


def test_a_loader_without_batches_yields_examples_as_they_are():
    data = RecordingDataset(4)
    found = source(DataLoader(data, batch_size=None, shuffle=True), seed=3)
    assert to_lists(found.epoch(0)) == randperm(4, 3)
    assert found.steps_per_epoch == 4
    stream = source(DataLoader(NumberStream(3), batch_size=None))
    assert to_lists(stream.epoch(0)) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_an_iterable_dataset_gives_what_torch_gives(workers):
    loader = DataLoader(NumberStream(9), batch_size=2, num_workers=workers, drop_last=True)
    assert to_lists(source(loader).epoch(0)) == to_lists(iter(loader))


def test_a_loader_that_iterates_in_its_own_way_is_iterated():
    class Doubling(DataLoader):
        def __iter__(self):
            return (2 * batch for batch in super().__iter__())

    found = source(Doubling(RecordingDataset(5), batch_size=2, shuffle=True), seed=1)
    full = to_lists(found.epoch(1))
    assert sorted(x for batch in full for x in batch) == [0, 2, 4, 6, 8]
    assert to_lists(found.epoch(1, start=1)) == full[1:]
    assert to_lists(found.epoch(2)) != full


def test_arguments_of_the_loader_are_errors():
    with pytest.raises(ArgumentError, match="batch_size, shuffle"):
        source(DataLoader(RecordingDataset(3)), batch_size=2, shuffle=True)


# -- micro-batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [RecordingDataset, NumberStream, lambda n: DataLoader(RecordingDataset(n)), lambda n: [float(i) for i in range(n)]]
)
def test_consecutive_batches_are_grouped(kind):
    data = kind(7)
    options = {} if isinstance(data, (DataLoader, list)) else {"batch_size": 1}
    found = source(data, micro_batches=3, **options)
    values = [[0, 1, 2], [3, 4, 5], [6]]
    expected = values if isinstance(data, list) else [[[x] for x in group] for group in values]
    for start in range(4):
        groups = list(found.epoch(0, start))
        assert all(type(group) is MicroBatches for group in groups)
        assert to_lists(groups) == expected[start:]
    if not isinstance(data, NumberStream):
        assert found.steps_per_epoch == 3
    with pytest.raises(DataError, match="cannot be resumed"):
        list(found.epoch(0, start=4))


def test_the_fetches_of_micro_batches_are_seeded_as_batches_of_their_own():
    alone = to_lists(source(AugmentedDataset(10), batch_size=2, shuffle=True).epoch(1))
    grouped = source(AugmentedDataset(10), batch_size=2, shuffle=True, micro_batches=2)
    assert [batch for group in to_lists(grouped.epoch(1)) for batch in group] == alone
    assert [batch for group in to_lists(grouped.epoch(1, start=1)) for batch in group] == alone[2:]


def test_an_epoch_sampler_gives_its_order_at_the_seed_of_the_source():
    data = RecordingDataset(11)
    sampler = EpochSampler(partial(permutation, 11), num_examples=11, seed=7)
    found = source(DataLoader(data, batch_size=4, sampler=sampler), seed=3)
    assert (found.num_examples, found.steps_per_epoch) == (11, 3)
    assert to_lists(found.epoch(2, start=1)) == chunks([float(i) for i in randperm(11, 5)], 4)[1:]
    assert len(data.reads) == 7  # what is skipped is not read
    rows = source(TensorDataset(torch.arange(11)), batch_size=4, sampler=sampler, seed=3, drop_last=True)
    assert to_lists(rows.epoch(2)) == [[chunk] for chunk in chunks(randperm(11, 5), 4, drop_last=True)]


def test_an_epoch_sampler_advances_by_complete_passes():
    sampler = EpochSampler(partial(permutation, 5), num_examples=5, seed=7)
    next(iter(sampler))
    passes = [list(sampler), list(sampler)]
    assert passes == [randperm(5, 7), randperm(5, 8)]
    sampler.set_epoch(0)
    assert list(sampler) == passes[0]


class Placing(DataLoader):
    """Iterates as torch's own does, and says so."""

    only_moves_batches = True

    def __iter__(self):
        return map(torch.clone, super().__iter__())


def test_a_loader_that_only_moves_its_batches_is_unwrapped():
    data = RecordingDataset(6)
    found = source(Placing(data, batch_size=2, shuffle=True), seed=1)
    assert to_lists(found.epoch(0, start=2)) == chunks([float(i) for i in randperm(6, 1)], 2)[2:]
    assert len(data.reads) == 2


@pytest.mark.parametrize("seedable", [False, True])
def test_loaders_that_accelerate_prepared_are_unwrapped(seedable):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(
        cpu=True, dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=seedable, data_seed=1)
    )
    data = RecordingDataset(6)
    loader = accelerator.prepare(DataLoader(data, batch_size=2, shuffle=True))
    found = source(loader, seed=1)
    full = [to_lists(found.epoch(epoch)) for epoch in (0, 1)]
    assert sorted(item for batch in full[1] for item in batch) == list(range(6))
    assert full == [chunks([float(i) for i in randperm(6, 1 + epoch)], 2) for epoch in (0, 1)]
    data.reads.clear()
    assert to_lists(found.epoch(1, start=2)) == full[1][2:]
    assert len(data.reads) == 2
    skipping = accelerate.skip_first_batches(loader, 1)
    assert len(to_lists(source(skipping, seed=1).epoch(0))) == 2


def test_a_stream_has_its_number_of_workers():
    assert source(NumberStream(6), batch_size=2, workers=2).stream_workers == 2
    assert (
        source(NumberStream(6), batch_size=2).stream_workers
        == source(RecordingDataset(6), batch_size=2, workers=2).stream_workers
        == 1
    )


class Slow(RecordingDataset):
    """Its first batch takes long."""

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(0.0 if index > 1 else 0.5)
        return super().__getitem__(index)


def test_batches_may_come_as_soon_as_a_worker_has_one():
    loader = DataLoader(Slow(6), batch_size=2, num_workers=2, in_order=False)
    found = to_lists(source(loader).epoch(0))
    assert found[0] == [2, 3]
    assert sorted(found) == [[0, 1], [2, 3], [4, 5]]
    assert dataloader_kwargs(2, {"in_order": True}) == {"num_workers": 2}
