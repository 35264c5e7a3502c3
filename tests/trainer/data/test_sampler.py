import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler

from fts.errors import DataError
from fts.loops.sampling import length_grouped_indices, permutation
from fts.randomness import get_rng_states, rng_states_equal
from fts.trainer.data import sampler
from fts.trainer.data.dataloader import train_dataloader
from fts.trainer.data.sampler import data_seed, eval_sampler, example_lengths, train_sampler
from fts.trainer.data.source import make_source
from tests.trainer.sample_data import minilm, settings, tokenized


def make_examples(lengths):
    return [{"input_ids": [1] * length, "number": number} for number, length in enumerate(lengths)]


def first(examples):
    return {"number": torch.tensor([example["number"] for example in examples])}


def test_the_order_follows_the_arguments():
    data = make_examples(range(9))
    assert list(train_sampler(data, settings(seed=3))) == permutation(9, 3, 0).tolist()
    assert list(train_sampler(data, settings(data_seed=4))) == permutation(9, 4, 0).tolist()
    assert type(train_sampler(data, settings(train_sampling_strategy="sequential"))) is SequentialSampler
    assert list(eval_sampler(data)) == list(range(9))
    assert data_seed(settings(data_seed=0)) == 0


@pytest.mark.parametrize("changes", [{"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}])
def test_examples_are_grouped_by_length_and_a_run_can_be_resumed(changes):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (100,), generator=generator).tolist()
    args = settings(gradient_accumulation_steps=2, **changes)
    loader = train_dataloader(make_examples(lengths), args, first, None, lambda data: train_sampler(data, args))
    run = make_source(loader, seed=42, device=args.device, what="training", micro_batches=2)
    full = [[batch["number"].tolist() for step in run.epoch(epoch) for batch in step] for epoch in (0, 1)]
    assert full == [[part.tolist() for part in length_grouped_indices(lengths, 8, 42, epoch).split(4)] for epoch in (0, 1)]
    resumed = [batch["number"].tolist() for step in run.epoch(1, start=5) for batch in step]
    assert resumed == full[1][10:]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(make_examples([1, 2]))


def test_streams_cannot_be_grouped():
    assert train_sampler(Stream(), settings()) is None
    assert eval_sampler(Stream()) is None
    with pytest.raises(DataError, match="group_by_length needs training data with __getitem__ and __len__; a Stream"):
        train_sampler(Stream(), settings(group_by_length=True))


class Tokenizer:
    model_input_names = ("input_values",)


def test_lengths_are_those_of_the_column_or_of_the_main_input():
    assert example_lengths(make_examples([3, 1, 2])).tolist() == [3, 1, 2]
    assert example_lengths([{"length": 5, "input_ids": [1]}]).tolist() == [5]
    assert example_lengths([{"size": 5, "length": 2}], column="size").tolist() == [5]
    sounds = [{"input_values": torch.zeros(4)}, {"input_values": torch.zeros(2)}]
    grouped = train_sampler(sounds, settings(group_by_length=True), Tokenizer())
    assert list(grouped) == [0, 1]
    with pytest.raises(DataError, match="'length' or 'input_ids'; there is one of text"):
        example_lengths([{"text": "a"}])
    with pytest.raises(DataError, match="there is one of tuple"):
        example_lengths([(1, 2)])


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_lengths_of_datasets_are_read_from_their_columns(form):
    data = tokenized(minilm())
    expected = [len(ids) for ids in data["input_ids"]]
    assert example_lengths(data.with_format(form)).tolist() == expected
    stated = data.add_column("length", list(range(30)))
    assert example_lengths(stated.with_format(form)).tolist() == list(range(30))
    assert example_lengths(stated.select([4, 2])).tolist() == [4, 2]
    shortened = data.with_transform(lambda batch: {"input_ids": [ids[:3] for ids in batch["input_ids"]]})
    assert example_lengths(shortened).tolist() == [3] * 30


class Drawing(list):
    def __getitem__(self, index):
        torch.rand(())
        return super().__getitem__(index)


def test_reading_lengths_isolates_generators_and_shows_a_bar_when_it_is_long(monkeypatch, capsys):
    before = get_rng_states(torch.device("cpu"))
    example_lengths(Drawing(make_examples([1, 2])), show=True)
    assert rng_states_equal(before, get_rng_states(torch.device("cpu")))
    assert "lengths" not in capsys.readouterr().err
    monkeypatch.setattr(sampler, "PROGRESS_BAR_FROM", 2)
    assert example_lengths(make_examples([1, 2]), show=True).tolist() == [1, 2]
    assert "lengths" in capsys.readouterr().err
