import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from fts.errors import ArgumentError, DataError
from fts.loops.sampling import permutation
from fts.trainer.arguments import TrainingArguments
from fts.trainer.data.collator import default_data_collator, get_data_collator
from fts.trainer.data.dataloader import (
    DeviceDataLoader,
    check_dataset,
    eval_dataloader,
    num_examples,
    num_tokens,
    select_eval_dataset,
    train_dataloader,
)
from fts.trainer.data.sampler import train_sampler
from fts.trainer.data.source import make_source
from tests.trainer.sample_data import minilm, settings, tokenized

CPU = torch.device("cpu")


def make_examples(count):
    return [{"x": float(i), "labels": i} for i in range(count)]


def train_loader(data, collator=default_data_collator, accepted=None, sampling=None, **changes):
    args = settings(**changes)
    return train_dataloader(data, args, collator, accepted, sampling or (lambda data: train_sampler(data, args)))


def visited(batches, name="x"):
    return [batch[name].tolist() for batch in batches]


def source(loader, seed=42, **changes):
    return make_source(loader, seed=seed, device=CPU, what="training", **changes)


class Numbers(IterableDataset):
    """A stream of examples, shared by workers."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(make_examples(self.count)[first::step])


@pytest.mark.parametrize(
    "changes", [{}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, {"dataloader_drop_last": True}]
)
def test_a_training_loader_has_the_order_of_the_run(changes):
    loader = train_loader(make_examples(11), **changes)
    assert type(loader) is DataLoader
    found = [visited(loader), visited(loader)]
    expected = [permutation(11, 42, epoch).float() for epoch in (0, 1)]
    full = [[part.tolist() for part in order.split(4)] for order in expected]
    assert found == [epoch[:2] for epoch in full] if "dataloader_drop_last" in changes else found == full
    run = source(train_loader(make_examples(11), **changes))
    assert [visited(run.epoch(epoch)) for epoch in (0, 1)] == found
    assert visited(run.epoch(1, start=1)) == found[1][1:]
    loader.sampler.set_epoch(0)
    assert visited(loader) == found[0]


def test_all_dataloader_arguments_are_used():
    loader = train_loader(
        make_examples(9),
        train_batch_size=3,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=5,
        dataloader_drop_last=True,
        dataloader_in_order=False,
    )
    assert not loader.in_order
    assert (loader.batch_size, loader.num_workers, loader.persistent_workers) == (3, 1, True)
    assert (loader.prefetch_factor, loader.drop_last, loader.pin_memory) == (5, True, False)
    evaluation = eval_dataloader(
        make_examples(9), settings(eval_batch_size=2, dataloader_drop_last=True), default_data_collator, None
    )
    assert (evaluation.batch_size, evaluation.drop_last, type(evaluation.sampler)) == (2, False, SequentialSampler)
    assert visited(evaluation)[-1] == [8.0]


def place(monkeypatch, device):
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device(device)))


def test_batches_are_moved_to_another_device(monkeypatch):
    place(monkeypatch, "meta")
    meta = train_loader(make_examples(4), use_cpu=False)
    assert type(meta) is DeviceDataLoader
    assert {batch["x"].device.type for batch in meta} == {"meta"}
    assert not meta.pin_memory
    run = source(train_loader(make_examples(4), train_batch_size=3))
    assert (run.num_examples, run.batches_per_epoch) == (4, 2)


def test_memory_is_pinned_for_gpus(monkeypatch):
    place(monkeypatch, "cuda:0")
    assert train_loader(make_examples(4), use_cpu=False).pin_memory
    assert not train_loader(make_examples(4), use_cpu=False, dataloader_pin_memory=False).pin_memory


def test_iterable_data_comes_as_it_is():
    loader = train_loader(Numbers(6))
    assert visited(loader) == [[0, 1, 2, 3], [4, 5]]
    run = source(train_loader(Numbers(6), dataloader_num_workers=2, train_batch_size=2))
    assert visited(run.epoch(0)) == [[0, 2], [1, 3], [4], [5]]
    assert (run.batches_per_epoch, run.num_examples, run.stream_workers) == (None, None, 2)
    assert visited(run.epoch(0, start=2)) == [[4], [5]]
    with pytest.raises(DataError, match="can only be iterated"):
        train_loader(Numbers(6), sampling=lambda data: [0])


class Plain:
    """Neither a dataset nor a list."""

    def __init__(self):
        self.epochs = []

    def __iter__(self):
        return iter(make_examples(5))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_any_iterable_is_wrapped_and_gets_the_epoch():
    data = Plain()
    run = source(train_loader(data))
    assert visited(run.epoch(3)) == [[0, 1, 2, 3], [4]]
    assert data.epochs == [3]
    assert run.batches_per_epoch is None
    with pytest.raises(ArgumentError, match="2 workers would each iterate all of a Plain"):
        train_loader(data, dataloader_num_workers=2)
    assert visited(source(train_loader(iter(make_examples(5)))).epoch(0, start=1)) == [[4]]


def test_streams_of_datasets_keep_their_epoch_and_lose_unused_columns():
    datasets = pytest.importorskip("datasets")
    stream = (
        datasets.Dataset.from_list([example | {"text": "a"} for example in make_examples(8)])
        .to_iterable_dataset()
        .shuffle(seed=1, buffer_size=8)
    )
    run = source(train_loader(stream, accepted=["x", "labels"]))
    first, second = (list(run.epoch(epoch)) for epoch in (0, 1))
    assert first[0].keys() == {"x", "labels"}
    assert visited(first) != visited(second)
    assert visited(run.epoch(1, start=1)) == visited(second)[1:]


class Counted:
    """A user's loader: ready batches, a length, and nothing else."""

    def __len__(self):
        return 3

    def __iter__(self):
        return (default_data_collator(make_examples(2)) for _ in range(3))


def test_a_loader_of_the_users_own_costs_only_itself():
    run = source(Counted(), micro_batches=2)
    assert (run.batches_per_epoch, run.steps_per_epoch, run.num_examples) == (3, 2, None)
    assert len(list(run.epoch(0, start=1))) == 1
    sampler = WeightedRandomSampler([1.0, 0.0, 1.0, 1.0], num_samples=6)
    loader = DataLoader(
        make_examples(4), batch_size=3, sampler=sampler, collate_fn=lambda examples: {"n": len(examples)} | examples[0]
    )
    weighted = source(loader)
    found = [list(weighted.epoch(epoch)) for epoch in (0, 1)]
    assert [batch["n"] for batch in found[0]] == [3, 3]
    assert list(weighted.epoch(1, start=1)) == found[1][1:]
    assert not any(batch["x"] == 1.0 for epoch in found for batch in epoch)
    assert found == [list(source(loader).epoch(epoch)) for epoch in (0, 1)]


def test_an_overridden_sampler_decides_the_order():
    backwards = train_loader(make_examples(5), sampling=lambda data: range(len(data) - 1, -1, -1))
    assert visited(backwards) == visited(source(backwards).epoch(2)) == [[4, 3, 2, 1], [0]]
    unsampled = train_loader(make_examples(5), sampling=lambda data: None)
    assert visited(unsampled) == visited(source(unsampled).epoch(0)) == [[0, 1, 2, 3], [4]]
    half = eval_dataloader(make_examples(5), settings(), default_data_collator, None, sampling=lambda data: [1, 3])
    assert visited(half) == [[1, 3]]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, ArgumentError, "needs a training set"),
        ([], DataError, r"The training set \(list\) is empty"),
        ({"x": [1]}, DataError, "Give one of the dictionary's values"),
        ("rows", DataError, "is a str; it must be a list of examples"),
        (nn.Module(), DataError, "is a Module"),
        (type("Endless", (), {"__getitem__": lambda self, index: {}})(), DataError, "needs __len__, too"),
    ],
)
def test_what_is_no_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        train_loader(data)


def test_sources_without_a_batch_are_refused():
    with pytest.raises(DataError, match="has 3 examples, fewer than a batch of 4, and dataloader_drop_last=True"):
        source(train_loader(make_examples(3), dataloader_drop_last=True))
    with pytest.raises(DataError, match=r"The training set \(list\) is empty"):
        source(DataLoader([]))
    with pytest.raises(DataError, match=r"The training loader \(list\) has no batch"):
        source([])
    with pytest.raises(DataError, match="NoneType is neither"):
        source(None)


def test_evaluation_sets_are_chosen_by_name():
    sets = {"short": [1], "long": [2]}
    assert select_eval_dataset("short", sets) == [1]
    assert select_eval_dataset([3], sets) == [3]
    assert select_eval_dataset(None, [4]) == [4]
    with pytest.raises(ArgumentError, match=r"no evaluation set 'middle'.*has 'short', 'long'"):
        select_eval_dataset("middle", sets)
    with pytest.raises(ArgumentError, match="it is a list"):
        select_eval_dataset("middle", [4])
    with pytest.raises(ArgumentError, match=r"several evaluation sets.*get_eval_dataloader\('short'\)"):
        select_eval_dataset(None, sets)
    with pytest.raises(ArgumentError, match="Evaluation needs data"):
        select_eval_dataset(None, None)


def test_examples_are_counted():
    assert num_examples(DataLoader(make_examples(5), batch_size=2), 2) == 5
    assert num_examples(Counted(), 8) == 24
    with pytest.raises(DataError, match="is unknown"):
        num_examples(DataLoader(Numbers(5), batch_size=2), 2)


def test_tokens_are_counted_as_batches_have_them(caplog):
    batches = [{"input_ids": torch.zeros(2, 3)}, {"input_ids": torch.zeros(1, 4)}]
    assert num_tokens(batches) == 10
    assert num_tokens(batches, max_steps=5) == 30
    assert num_tokens([{"x": 1}]) == 0
    assert "no 'input_ids'" in caplog.text


def test_an_empty_iterable_is_no_error_before_it_is_read():
    check_dataset(Numbers(0), "training")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 3)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        raise NotImplementedError


@pytest.mark.parametrize(("seed", "data_seed"), [(42, None), (3, 11)])
def test_the_loader_visits_what_transformers_visits(tmp_path, seed, data_seed):
    transformers = pytest.importorskip("transformers")
    tokenizer = minilm()
    data = tokenized(tokenizer)
    theirs = transformers.Trainer(
        Classifier(),
        transformers.TrainingArguments(
            str(tmp_path), seed=seed, data_seed=data_seed, per_device_train_batch_size=4, use_cpu=True, report_to="none"
        ),
        train_dataset=data,
        processing_class=tokenizer,
    ).get_train_dataloader()
    accepted = ["input_ids", "attention_mask", "token_type_ids", "labels", "label", "label_ids"]
    collator = get_data_collator(tokenizer)
    changes = {"seed": seed, "data_seed": data_seed, "dataloader_num_workers": 2}
    ours = source(train_loader(data, collator, accepted, **changes), seed=seed if data_seed is None else data_seed)
    for epoch in range(2):
        theirs.set_epoch(epoch)
        for expected, found in zip(theirs, ours.epoch(epoch), strict=True):
            assert found.keys() == expected.keys()
            assert all(found[name].equal(expected[name]) for name in expected)
