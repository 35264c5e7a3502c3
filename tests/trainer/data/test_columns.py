import logging

import pytest
import torch
from torch import nn

from fts.errors import DataError
from fts.trainer.data.collator import default_data_collator
from fts.trainer.data.columns import (
    find_labels,
    forward_arguments,
    remove_unused_columns,
    signature_columns,
    unexpected_keys,
    unwrap_model,
)
from fts.trainer.data.dataloader import eval_dataloader
from tests.trainer.sample_data import settings


class Net(nn.Module):
    def forward(self, x, mask=None, labels=None): ...


class Anything(nn.Module):
    def forward(self, **inputs): ...


class ReaderForQuestionAnswering(nn.Module):
    def forward(self, x, start_positions=None, end_positions=None): ...


def examples():
    return [{"x": [1.0, 2.0], "text": "a", "label": 1} for _ in range(4)]


def test_the_columns_of_a_model_are_the_arguments_of_its_forward():
    assert signature_columns(Net(), ["labels", "target"]) == ("x", "mask", "labels", "label", "label_ids", "target")
    assert signature_columns(Anything(), ["labels"]) is None
    assert find_labels(Net()) == ["labels"]
    assert find_labels(ReaderForQuestionAnswering()) == ["start_positions", "end_positions"]
    assert unexpected_keys(Net(), {"x": 1, "text": 2}) == ["text"]
    assert unexpected_keys(Anything(), {"text": 2}) == []


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_unwrapped(wrap):
    assert unwrap_model(wrap(Net())).__class__ is Net
    assert forward_arguments(wrap(Net())) == ["x", "mask", "labels"]


def test_models_of_peft_are_unwrapped():
    peft = pytest.importorskip("peft")

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, x, labels=None): ...

    config = peft.LoraConfig(target_modules=["lin"])
    for model in (peft.get_peft_model(Small(), config), peft.PeftMixedModel(Small(), config)):
        assert type(unwrap_model(model)) is Small
        assert signature_columns(model, find_labels(model)) == ("x", "labels", "label", "label_ids")


def batch_of(data, accepted):
    return next(iter(eval_dataloader(data, settings(), default_data_collator, accepted)))


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_datasets_lose_what_the_model_does_not_take(form, caplog):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(examples()).with_format(form)
    with caplog.at_level(logging.INFO):
        kept, collator = remove_unused_columns(data, default_data_collator, ["x", "label"], "training")
    assert kept.column_names == ["x", "label"]
    assert collator is default_data_collator
    assert "training set's columns text" in caplog.text
    found = batch_of(data, ["x", "label"])
    assert found["x"].tolist() == [[1.0, 2.0]] * 4
    assert found["labels"].dtype == torch.int64
    assert found["labels"].tolist() == [1] * 4
    with pytest.raises(DataError, match="takes none of the training set's columns: they are x, text, label; it takes y"):
        remove_unused_columns(data, default_data_collator, ["y"], "training")


def test_columns_that_a_transform_makes_are_kept():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": "a", "label": 1}] * 3)
    made = data.with_transform(lambda batch: {"x": [[1.0] for _ in batch["text"]], "label": batch["label"], "raw": batch["text"]})
    assert batch_of(made, ["x", "label"]).keys() == {"x", "labels"}


def test_streams_without_known_columns_are_filtered_in_front_of_the_collator():
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(examples()).to_iterable_dataset().map(lambda row: {"y": 1.0})
    assert stream.column_names is None
    assert batch_of(stream, ["y", "label"]).keys() == {"y", "labels"}


def test_dictionaries_lose_keys_that_the_model_does_not_take():
    assert batch_of(examples(), ["x", "label"]).keys() == {"x", "labels"}
    with pytest.raises(DataError, match="takes none of the evaluation set's columns: they are x, text, label"):
        batch_of(examples(), ["y"])
    assert batch_of(examples(), None).keys() == {"x", "labels"}  # text is left out by the collator


def test_examples_without_columns_are_unchanged():
    class Row:
        def __init__(self):
            self.x = 1.0

    assert batch_of([Row(), Row()], ["y"])["x"].tolist() == [1.0, 1.0]
