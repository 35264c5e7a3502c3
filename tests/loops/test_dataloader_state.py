"""A stream with `state_dict` resumes at any batch, equals the uninterrupted one, and reads no skipped examples."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import fts
from fts import loops, transforms as tx
from fts.errors import CheckpointError
from fts.loops import Position
from fts.steps import MicroBatches

EPOCHS = 2


class Counting(IterableDataset):
    """Numbers, shuffled by epoch, divided over workers; every read is recorded in memory that workers share."""

    def __init__(self, count=23, *, noisy=True):
        self.count = count
        self.noisy = noisy
        self.at = 0
        self.epoch = 0
        self.reads = torch.zeros(8, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self.epoch = epoch

    def state_dict(self):
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.at = state["at"]
        assert state["epoch"] == self.epoch or self.at == 0

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        order = np.random.default_rng(self.epoch).permutation(self.count)
        own = [int(i) for i in order if i % (workers + 1) == worker or (i % (workers + 1) == workers and worker == 0)]  # uneven
        while self.at < len(own):
            self.at += 1
            self.reads[worker] += 1
            noise = random.random() + torch.rand(()).item() + np.random.rand() if self.noisy else 0.0
            yield torch.tensor([own[self.at - 1], noise], dtype=torch.float64)
        self.at = 0


class Endless(Counting):
    """Counts its epochs itself, as data without `set_epoch` does."""

    set_epoch = None

    def load_state_dict(self, state):
        self.at, self.epoch = state["at"], state["epoch"]

    def __iter__(self):
        yield from super().__iter__()
        self.epoch += 1


def flat(batch):
    parts = batch if isinstance(batch, MicroBatches) else [batch]
    return [
        np.asarray(part).tolist() if not isinstance(part, dict) else {k: list(map(str, v)) for k, v in part.items()}
        for part in parts
    ]


def walk(source, position, state_dict, epochs=EPOCHS):
    """Positions, state dicts and batches from a position to the end, as `loops.fit` with a save after each step sees them."""
    source = source.with_state_dict(position, state_dict)
    found = []
    epoch, start = position.epoch, position.batch
    while epoch < epochs:
        for batch in source.epoch(epoch, start):
            start += 1
            at = Position(epoch, start)
            found.append((at, source.state_dict(at), flat(batch)))
        epoch, start = epoch + 1, 0
        at = Position(epoch, 0)
        found.append((at, source.state_dict(at), None))
    return found


def assert_resumes(make, *, every=1, boundary=True):
    """The remaining batches are the same from each position with a state dict, and where skipped examples are read."""
    full = walk(make(), Position(), None)
    plain = [batch for _, _, batch in full]
    assert sum(batch is not None for batch in plain) > 2
    for index in range(0, len(full), every):
        position, state_dict, batch = full[index]
        if position.epoch == EPOCHS:
            continue
        if batch is not None or boundary:
            assert state_dict is not None, position
        restored = json.loads(json.dumps(state_dict))
        rest = walk(make(), position, restored)
        assert [(at, batch) for at, _, batch in rest] == [(at, batch) for at, _, batch in full[index + 1 :]], position
        again, second, _ = rest[len(rest) // 2]  # and a resumed run can be resumed
        if again.epoch < EPOCHS and (second is not None or again.batch):
            assert second is not None
            assert [(at, batch) for at, _, batch in walk(make(), again, second)] == [
                (at, batch) for at, _, batch in rest[len(rest) // 2 + 1 :]
            ]
    return full


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("data", [Counting, Endless])
def test_every_position_without_workers(data, micro_batches, drop_last):
    assert_resumes(lambda: loops.source(data(), batch_size=4, micro_batches=micro_batches, drop_last=drop_last))


@pytest.mark.parametrize(
    ("workers", "micro_batches", "options"),
    [(1, 1, {}), (2, 2, {}), (3, 1, {}), (3, 2, {"persistent_workers": True})],
)
def test_every_position_with_workers(workers, micro_batches, options):
    def make():
        return loops.source(Counting(19), batch_size=2, workers=workers, micro_batches=micro_batches, **options)

    assert_resumes(make, every=4 if workers > 1 else 3, boundary=bool(options))


def test_persistent_workers_keep_the_state_of_the_data():
    def make():
        return loops.source(Endless(9), batch_size=2, workers=2, persistent_workers=True)

    full = assert_resumes(make, every=3)
    first, second = ([batch for at, _, batch in full if at.epoch == epoch and batch is not None] for epoch in (0, 1))
    assert first != second


def test_ready_batches_and_loaders():
    assert_resumes(lambda: loops.source(Counting(7)))
    assert_resumes(lambda: loops.source(DataLoader(Counting(11), batch_size=3)))
    assert_resumes(lambda: loops.source(DataLoader(Counting(11), batch_size=3, num_workers=2)), every=3, boundary=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_examples_are_not_read(workers):
    def make(data):
        return loops.source(data, batch_size=10, workers=workers, **({"prefetch_factor": 1} if workers else {}))

    source = make(Counting(200, noisy=False))
    batches = source.epoch(0)
    for _ in range(15):
        next(batches)
    position = Position(0, 15)
    state_dict = source.state_dict(position)
    full = list(make(Counting(200, noisy=False)).epoch(0))
    left = sum(len(batch) for batch in full[15:])
    assert left < 60
    for found, reads in ((state_dict, left), (None, 200)):
        data = Counting(200, noisy=False)
        rest = list(make(data).with_state_dict(position, found).epoch(0, 15))
        assert all(torch.equal(one, other) for one, other in zip(rest, full[15:], strict=True))
        assert int(data.reads.sum()) == reads


def test_a_state_dict_is_only_of_the_current_position():
    source = loops.source(Counting(), batch_size=4)
    batches = source.epoch(0)
    next(batches), next(batches)
    assert source.state_dict(Position(0, 2)) is not None
    assert [source.state_dict(place) for place in (Position(0, 1), Position(0, 3), Position(1, 0), Position(1, 2))] == [None] * 4
    assert source.with_state_dict(Position(0, 2), source.state_dict(Position(0, 2))).resume_from is not None
    other = loops.source(Counting(), batch_size=4, workers=2)
    assert (
        other.with_state_dict(Position(0, 2), source.state_dict(Position(0, 2))).resume_from is None
    )  # of another number of workers


@pytest.mark.parametrize("options", [{}, {"workers": 1, "persistent_workers": True}])
def test_an_epoch_that_was_left_restarts(options):
    source = loops.source(Counting(), batch_size=4, **options)
    full = [flat(batch) for batch in source.epoch(0)]
    left = source.epoch(0)
    assert flat(next(left)) == full[0]
    del left
    assert [flat(batch) for batch in source.epoch(0)] == full
    assert [flat(batch) for batch in source.epoch(0, 2)] == full[2:]


def test_other_sizes_resume_at_the_same_example():
    source = loops.source(Counting(noisy=False), batch_size=4)
    full = [row for batch in source.epoch(0) for row in batch.tolist()]
    batches = source.epoch(0)
    next(batches), next(batches), next(batches)
    state_dict = source.state_dict(Position(0, 3))
    data = Counting(noisy=False)
    rest = loops.source(data, batch_size=2, micro_batches=3).with_state_dict(Position(0, 2), state_dict)
    assert [row for group in rest.epoch(0, 2) for batch in group for row in batch.tolist()] == full[12:]
    assert int(data.reads.sum()) == 11


class Unwritable(Counting):
    def state_dict(self):
        return {"at": self.at, "epoch": self.epoch, "order": torch.arange(2)}


class Tuples(Counting):
    def state_dict(self):
        return {"at": (self.at,)}

    def load_state_dict(self, state):
        (self.at,) = state["at"]


@pytest.mark.parametrize(("data", "why"), [(Unwritable, "Tensor is not JSON"), (Tuples, "tuples")])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_that_is_not_json_is_one_warning_and_examples_are_read_again(data, why, workers, caplog):
    source = loops.source(data(), batch_size=4, workers=workers)
    with caplog.at_level(logging.WARNING):
        for number, _ in enumerate(source.epoch(0), 1):
            assert source.state_dict(Position(0, number)) is None
    (record,) = caplog.records
    assert why in record.getMessage()
    assert f"a {data.__name__} cannot be saved in checkpoints" in record.getMessage()
    again = loops.source(data(), batch_size=4, workers=workers).with_state_dict(Position(0, 2), None)
    full = [flat(batch) for batch in loops.source(data(), batch_size=4, workers=workers).epoch(0)]
    assert [flat(batch) for batch in again.epoch(0, 2)] == full[2:]


@pytest.mark.parametrize(
    "state_dict",
    [
        {},
        {"turn": 1, "readers": [None]},
        {"turn": "0", "readers": [None]},
        {"turn": 0, "readers": [1]},
        {"turn": 0, "readers": [{"taken": -1, "ended": False}]},
        {"turn": 0, "readers": [{"taken": 1, "ended": 0}]},
    ],
    ids=str,
)
def test_a_corrupt_state_dict_is_an_error(state_dict):
    with pytest.raises(CheckpointError, match="corrupt"):
        loops.source(Counting(), batch_size=4).with_state_dict(Position(0, 1), state_dict)


# Hugging Face datasets


def table(count=22, shards=3):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"a": list(range(count)), "b": ["x"] * count}).to_iterable_dataset(num_shards=shards)


def interleaved(**options):
    import datasets

    return datasets.interleave_datasets([table(9), table(15, 4)], stopping_strategy="all_exhausted", **options)


def concatenated():
    import datasets

    return datasets.concatenate_datasets([table(7), table(5, 1)])


def doubled(rows):
    return {"a": [2 * i for i in rows["a"] for _ in range(2)], "b": [text for text in rows["b"] for _ in range(2)]}


PIPELINES = {
    "plain": table,
    "map": lambda: table().map(lambda row: {"c": row["a"] + 1}),
    "batched map": lambda: table(12).map(doubled, batched=True, batch_size=5),
    "filter": lambda: table().filter(lambda row: row["a"] % 3 > 0),
    "shuffled shards": lambda: table(20, 6).shuffle(seed=3, buffer_size=1),
    "skip and take": lambda: table().skip(3).take(17),
    "repeat": lambda: table(8).repeat(2),
    "interleaved": interleaved,
    "interleaved at random": lambda: interleaved(probabilities=[0.4, 0.6], seed=7),
    "concatenated": concatenated,
    "torch": lambda: table().with_format("torch"),
    "batches": lambda: table().batch(3),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_position_of_datasets(name):
    pytest.importorskip("datasets")
    size = {"collate": list} if name == "batches" else {}
    assert_resumes(lambda: loops.source(PIPELINES[name](), batch_size=3, **size), every=3)


@pytest.mark.parametrize("name", ["interleaved", "shuffled shards"])
def test_every_position_of_datasets_with_workers(name):
    pytest.importorskip("datasets")
    assert_resumes(lambda: loops.source(PIPELINES[name](), batch_size=2, workers=2), every=7, boundary=False)


def test_a_shuffle_buffer_is_read_again_with_a_warning(caplog):
    """`datasets` leaves the buffer out of its state: a run that trusted it would see other rows."""
    make = lambda: loops.source(table().shuffle(seed=3, buffer_size=8).map(lambda row: row), batch_size=3)  # noqa: E731
    source = make()
    full = [flat(batch) for batch in source.epoch(0)]
    batches = source.epoch(0)
    for _ in range(3):
        next(batches)
    position = Position(0, 3)
    with caplog.at_level(logging.WARNING, logger="fts"):
        assert source.state_dict(position) is None
    assert "leaves out what its shuffle buffer holds" in caplog.text
    assert [flat(batch) for batch in make().with_state_dict(position, None).epoch(0, 3)] == full[3:]
    trusted = table().shuffle(seed=3, buffer_size=8)
    rows = iter(trusted)
    seen = [next(rows)["a"] for _ in range(9)]
    rest = table().shuffle(seed=3, buffer_size=8)
    rest.load_state_dict(trusted.state_dict())
    assert sorted(seen + [row["a"] for row in rest]) != list(range(22))


def test_an_evaluation_on_a_part_of_the_same_dataset_does_not_move_the_position():
    data = table(24)
    train, held_out = data.skip(6), data.take(6)
    source = loops.source(train, batch_size=3)
    full = [flat(batch) for batch in source.epoch(0)]
    batches = source.epoch(0)
    next(batches), next(batches)
    assert len(list(loops.source(held_out, batch_size=2).epoch(0))) == 3
    list(train)  # the very dataset, too
    state_dict = source.state_dict(Position(0, 2))
    assert flat(next(batches)) == full[2]
    assert [
        flat(batch) for batch in loops.source(train, batch_size=3).with_state_dict(Position(0, 2), state_dict).epoch(0, 2)
    ] == full[2:]
    assert [row["a"] for row in train] == list(range(6, 24))  # and nothing is left of it in the dataset


def test_fit_saves_the_position_and_resumes_there(tmp_path):
    def step(state, batch):
        new = state.replace(step=state.step + 1, params={"w": state.params["w"] + batch.sum()})
        return new, {"sum": new.params["w"]}

    def source():
        return loops.source(Counting(), batch_size=4, seed=5)

    def save(state, position):
        return loops.save_checkpoint(tmp_path / "checkpoint", state, position, extra={"data": data.state_dict(position)})

    first = fts.TrainState.create({"w": torch.zeros((), dtype=torch.float64)}, tx.sgd(0.1))
    *_, full = loops.fit(step, first, source(), epochs=2, donate=False)
    data = source()
    stop = {"save": 9, "stop": lambda counters: counters.step == 9}
    *_, left = loops.fit(step, first, data, epochs=2, save=save, due=loops.cadence(**stop), donate=False)
    assert left.reason == "due"
    state, position = loops.load_checkpoint(tmp_path / "checkpoint", like=first)
    assert position == Position(1, 3)
    data = source().with_state_dict(position, loops.load_extra(tmp_path / "checkpoint")["data"])
    *_, end = loops.fit(step, state, data, epochs=2, start=position, donate=False)
    assert torch.equal(end.state.params["w"], full.state.params["w"])
    assert end.counters == full.counters
