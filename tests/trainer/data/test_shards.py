"""The local shards of the training data; the ranks are simulated, one after the other."""

import attrs
import pytest
import torch
from hypothesis import given, settings as examples, strategies as st
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fts.errors import ArgumentError, DataError
from fts.loops import Position
from fts.steps import MicroBatches, PaddingBatch
from fts.trainer import Trainer
from fts.trainer.arguments import data_parallel
from fts.trainer.checkpoints.epoch_layout import EpochLayout, convert_position
from fts.trainer.data import shards, source
from fts.trainer.data.batch_samples import SampledBatches, with_batch_samples
from fts.trainer.data.sampler import data_seed
from fts.trainer.run.plan import make_plan
from tests.trainer.helpers import Linear, make_trainer
from tests.trainer.sample_data import settings

ROWS = 23


def numbered(count=ROWS):
    return [{"x": torch.full((4,), float(i)), "labels": float(i), "input_ids": list(range(1 + 7 * i % 11))} for i in range(count)]


def collate(batch):
    return {"x": torch.stack([each["x"] for each in batch]), "labels": torch.tensor([each["labels"] for each in batch])}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(numbered())


@pytest.fixture
def as_process(monkeypatch):
    """Let this process be one of several."""

    def become(rank, size):
        for module in (data_parallel, shards, source):
            monkeypatch.setattr(module, "data_parallel_rank_and_size", lambda args: (rank, size))

    return become


def trainer_of(tmp_path, kind=Trainer, data=None, **changes):
    args = {"data_collator": collate, "train_dataset": numbered() if data is None else data, "remove_unused_columns": False}
    return make_trainer(tmp_path, Linear(), **(args | changes)) if kind is Trainer else kind(tmp_path, args | changes)


def visited(source, epoch=0, start=0):
    """The labels of each micro-batch of each step; those without weight are left out."""
    parts = [list(batch) if isinstance(batch, MicroBatches) else [batch] for batch in source.epoch(epoch, start)]
    return [[[] if isinstance(micro, PaddingBatch) else micro["labels"].tolist() for micro in step] for step in parts]


def interleaved(sources, **where):
    """The examples of each update, in the order of a single process."""
    found = [visited(source, **where) for source in sources]
    assert len({len(steps) for steps in found}) == 1
    return [
        [row for column in zip(*parts, strict=True) for micro in column for row in micro] for parts in zip(*found, strict=True)
    ]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "sequential", "accelerator_config": {"even_batches": False}},
        {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 6},
        {"data": Stream(), "max_steps": 5, "accelerator_config": {"dispatch_batches": False}},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_an_update_has_the_examples_of_a_single_process(changes, size, tmp_path, as_process):
    splits = changes.get("accelerator_config", {}).get("split_batches", False)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | changes
    alone = trainer_of(tmp_path, **(settings | {"gradient_accumulation_steps": 2 if splits else 2 * size}))
    one = alone.train_source(seed=5)
    plan, total = alone.plan(), alone.get_total_train_batch_size(alone.args)
    shares = []
    for rank in range(size):
        as_process(rank, size)
        trainer = trainer_of(tmp_path, **settings)
        shares.append(trainer.train_source(seed=5))
        found = attrs.evolve(trainer.plan(), accumulate=plan.accumulate, schedule=plan.schedule)
        assert found == plan
        assert trainer.get_total_train_batch_size(trainer.args) == total
        if "data" not in changes:
            assert trainer.num_examples(trainer.get_train_dataloader()) == ROWS
            values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
            assert (values[0], values[1], values[2], values[6]) == (plan.epochs, plan.steps_per_epoch, ROWS, plan.total_steps)
    for where in ({"epoch": 0}, {"epoch": 1, "start": 1}):
        expected = [[row for micro in step for row in micro] for step in visited(one, **where)]
        assert interleaved(shares, **where) == expected
    assert {share.steps_per_epoch for share in shares} == {one.steps_per_epoch}
    assert {share.num_examples for share in shares} == {one.num_examples}


def test_data_that_can_only_be_iterated_are_dispatched_unless_that_is_refused(tmp_path, as_process, monkeypatch):
    given = []
    monkeypatch.setattr(shards.loops, "shard_source", lambda source, *place, **how: given.append(how) or source)
    as_process(0, 2)
    for data, said in ((None, None), (Stream(), None), (None, True), (Stream(), False)):
        trainer_of(tmp_path, data=data, max_steps=1, accelerator_config={"dispatch_batches": said}).train_source(0)
    assert [how["dispatch"] for how in given] == [False, True, True, False]
    assert [how["group"] is None for how in given] == [True, False, False, True]


def test_a_batch_that_cannot_be_split_is_an_error(tmp_path, as_process):
    as_process(0, 2)
    with pytest.raises(ArgumentError, match="batches of 3 examples over 2 processes"):
        trainer_of(tmp_path, per_device_train_batch_size=3, accelerator_config={"split_batches": True}).train_source(0)


def test_samplers_and_data_that_divide_the_examples_are_refused(tmp_path, as_process):
    data = numbered()

    class Divided(Trainer):
        def get_train_dataloader(self):
            return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, 0), collate_fn=collate)

    as_process(0, 2)
    trainer = Divided(Linear(), settings(), train_dataset=data)
    with pytest.raises(DataError, match="by its DistributedSampler, and would be sharded twice"):
        trainer.train_source(0)
    datasets = pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    stream = datasets.Dataset.from_dict({"labels": [1.0] * 8}).to_iterable_dataset()
    with pytest.raises(DataError, match="split_dataset_by_node"):
        trainer_of(tmp_path, data=split_dataset_by_node(stream, 0, 2), max_steps=2).train_source(0)


def test_get_batch_samples_does_not_see_padding_batches(tmp_path, as_process):
    seen = []

    def draw(iterator, wanted, device):
        found = [batch for _, batch in zip(range(wanted), iterator, strict=False)]
        seen.append([batch["labels"].tolist() for batch in found])
        return found, sum(len(batch["labels"]) for batch in found)

    as_process(1, 2)
    source = trainer_of(tmp_path, data=numbered(9), train_sampling_strategy="sequential").train_source(0)
    first, last = with_batch_samples(source, draw, torch.device("cpu")).epoch(0)
    assert isinstance(first, SampledBatches) and first.num_items_in_batch == 4
    assert seen == [[[4.0, 5.0, 6.0, 7.0]], []]
    assert len(last) == 1 and isinstance(last[0], PaddingBatch) and last.num_items_in_batch == 0


SIZES = st.integers(1, 4)


@examples(deadline=None)
@given(
    items=st.integers(1, 60),
    batch=SIZES,
    accumulate=SIZES,
    before=SIZES,
    after=SIZES,
    drop_last=st.booleans(),
    at=st.integers(0, 9),
)
def test_positions_are_those_of_other_numbers_of_processes(items, batch, accumulate, before, after, drop_last, at):
    old = EpochLayout(batch, accumulate, items, drop_last, processes=before)
    new = EpochLayout(batch, accumulate, items, drop_last, processes=after)
    assert old.updates_per_epoch is not None and new.updates_per_epoch is not None
    position = Position(1, min(at, old.updates_per_epoch))
    try:
        moved = convert_position(position, old, new)
    except ArgumentError:
        assert 0 < position.batch < old.updates_per_epoch and position.batch * old.examples_per_update % new.examples_per_update
        return
    if position.batch == old.updates_per_epoch and position.batch:
        assert moved == Position(1, new.updates_per_epoch)
    else:
        assert moved.batch * new.examples_per_update == position.batch * old.examples_per_update
        assert convert_position(moved, new, old) == position or moved.batch >= new.updates_per_epoch


def test_updates_of_a_layout_are_those_of_the_sharded_source(tmp_path, as_process):
    for drop_last in (False, True):
        for size in (1, 2, 3):
            as_process(0, size)
            trainer = trainer_of(
                tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, dataloader_drop_last=drop_last
            )
            source = trainer.train_source(data_seed(trainer.args))
            assert source.steps_per_epoch == EpochLayout(3, 2, ROWS, drop_last, processes=size).updates_per_epoch


def test_the_plan_counts_the_examples_of_all_ranks(as_process):
    as_process(0, 4)
    plan = make_plan(settings(max_steps=10, train_batch_size=2, gradient_accumulation_steps=3), batches=5, num_examples=40)
    assert (plan.samples, plan.steps_per_epoch) == (10 * 2 * 3 * 4, 2)
