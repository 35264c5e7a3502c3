import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fts.errors import BatchError, DataError
from fts.loops import source
from fts.randomness import get_rng_states, rng_states_equal
from fts.trainer.data.collator import default_data_collator
from fts.trainer.data.validation import MAX_EXAMPLES, check_batch, check_dataloader, check_examples, check_first_batch

OWN = SimpleNamespace(label_names=("labels",), compute_loss_func=None)


class Net(nn.Module):
    def forward(self, x, mask=None, labels=None): ...


def check(data, model=None, loss=OWN, collator=default_data_collator, **changes):
    check_examples(data, collator, Net() if model is None else model, loss, "training", batch_size=4, **changes)


def make_examples(**changes):
    return [{"x": 1.0, "labels": 0} | changes] * 3


def test_good_data_passes():
    check(make_examples())
    check(make_examples(mask=1))
    check([{"x": 1.0}], labelled=False)
    check([{"x": 1.0}], loss=SimpleNamespace(label_names=("labels",), compute_loss_func=len))
    check([{"x": 1.0}], loss=SimpleNamespace(label_names=(), compute_loss_func=None))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"x": 1.0}], r"has no labels: a batch has x, the model's labels are called labels. .*label_names="),
        (make_examples(extra=1), r"Net.forward does not take extra, which a batch of the training set has"),
        ([{"mask": 1, "labels": 1}], r"Net.forward needs x, which a batch of the training set lacks: it has mask, labels"),
        ([{"x": [1], "labels": 0}, {"x": [1, 2], "labels": 0}], r"'x' cannot be stacked"),
        ([{"x": 1.0, "labels": 0}, {"x": 1.0}], r"has 'labels', another one lacks it"),
    ],
)
def test_batches_that_a_model_cannot_use_are_refused(data, message):
    with pytest.raises((DataError, BatchError), match=message):
        check(data)


def test_a_batch_is_a_dictionary():
    with pytest.raises(DataError, match="made a list of the training set"):
        check(make_examples(), collator=list)


def test_a_collator_that_fails_says_on_what():
    def collate(examples):
        raise KeyError("input_ids")

    with pytest.raises(DataError, match=r"data_collator \(collate\) cannot make a batch of .*columns x, labels: KeyError"):
        check(make_examples(), collator=collate)


class Optional(nn.Module):
    def forward(self, input_ids=None, inputs_embeds=None, labels=None): ...


def test_labels_alone_are_no_batch():
    with pytest.raises(DataError, match=r"nothing but labels \(labels\), and none of the inputs of Optional.forward \(input_ids"):
        check([{"labels": 1}], Optional())
    with pytest.raises(DataError, match="has nothing, and none"):
        check([{"text": "a"}], Optional())


def test_a_method_that_computes_the_loss_may_do_anything_with_a_batch():
    check([{"anything": 1.0}], loss=None)
    check([{"anything": 1.0}], loss=None, collator=list)
    with pytest.raises(BatchError):
        check([{"x": [1]}, {"x": [1, 2]}], loss=None)


class Noisy:
    """Draws from every generator, and notes what is read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.read.append(index)
        return {"x": torch.rand(()) + np.random.rand() + random.random(), "labels": 0}


def test_checks_change_no_random_state_and_read_few_examples():
    data, before = Noisy(), get_rng_states(torch.device("cpu"))
    check(data)
    check_examples(data, default_data_collator, Net(), OWN, "training", batch_size=64)
    assert rng_states_equal(before, get_rng_states(torch.device("cpu")))
    assert data.read == [*range(4), *range(MAX_EXAMPLES)]


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("must not be read")


def test_nothing_that_could_be_consumed_is_read():
    def consumed():
        yield pytest.fail("must not be read")

    check(Stream())
    check(consumed())
    check([])
    for loader in (DataLoader(Stream()), consumed(), [{"x": 1}], DataLoader(Noisy(), sampler=[7], batch_size=None)):
        check_dataloader(loader, Net(), OWN, "training")
    own = DataLoader(Noisy(), batch_sampler=[[7, 8], [9]])
    check_dataloader(own, Net(), OWN, "training")
    assert own.dataset.read == []


def test_a_loader_is_checked_by_its_data_set_and_collator():
    check_dataloader(DataLoader(make_examples(), batch_size=2, collate_fn=default_data_collator), Net(), OWN, "training")
    with pytest.raises(DataError, match="evaluation set has no labels"):
        check_dataloader(DataLoader([{"x": 1.0}], batch_size=2), Net(), OWN, "evaluation")
    check_dataloader(DataLoader([{"x": 1.0}], batch_size=2), Net(), OWN, "evaluation", labelled=False)


def test_iterable_data_is_checked_at_its_first_batch():
    seen = []
    watched = check_first_batch(source([[1], [2], [3]]), seen.append)
    assert list(watched.epoch(0, start=1)) == [[2], [3]]
    assert list(watched.epoch(1)) == [[1], [2], [3]]
    assert seen == [[2]]

    def refuse(batch):
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        next(check_first_batch(source([[1]]), refuse).epoch(0))


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(head, **changes):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**SMALL, **changes))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


IDS = torch.tensor([[1, 2], [3, 49]])
ONE = torch.tensor([0, 2])
TAGS = torch.tensor([[0, -100], [2, 1]])

GOOD = {
    "classes": (lambda: bert("SequenceClassification", num_labels=3), ONE),
    "a class that does not count": (lambda: bert("SequenceClassification", num_labels=3), torch.tensor([-100, 2])),
    "several labels": (lambda: bert("SequenceClassification", num_labels=3), torch.ones(2, 3)),
    "numbers": (lambda: bert("SequenceClassification", num_labels=1), torch.tensor([0.5, 7.0])),
    "whole numbers as numbers": (lambda: bert("SequenceClassification", num_labels=1), torch.tensor([5, 7])),
    "tags": (lambda: bert("TokenClassification", num_labels=3), TAGS),
    "masked": (lambda: bert("MaskedLM"), torch.tensor([[49, -100], [0, -100]])),
    "causal": (gpt2, IDS),
    "causal, first of a row, which is not predicted": (gpt2, torch.tensor([[50, 4], [-1, 1]])),
}

BAD = {
    "class too high": (GOOD["classes"][0], torch.tensor([0, 3]), r"has the label 3, .*has 3 classes, 0 to 2. Set num_labels"),
    "class too low": (GOOD["classes"][0], torch.tensor([-1, 2]), r"has the label -1"),
    "floats as classes": (
        GOOD["classes"][0],
        torch.tensor([0.0, 2.0]),
        r"float32 with one number per example, and Bert.* 3 classes",
    ),
    "int32 classes": (GOOD["classes"][0], ONE.int(), r"torch.int32; .* predicts one of 3, so they must be .*int64"),
    "whole numbers for several": (
        lambda: bert("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        torch.ones(2, 3, dtype=torch.int64),
        r"Give a vector of 0.0 and 1.0 for each example, as floats",
    ),
    "floats as one class": (
        lambda: bert("SequenceClassification", num_labels=3, problem_type="single_label_classification"),
        torch.tensor([0.0, 2.0]),
        r"must be integers \(int64\)",
    ),
    "tag too high": (GOOD["tags"][0], TAGS + 1, r"has the label -99|has the label 3"),
    "masked token": (GOOD["masked"][0], torch.tensor([[50, -100], [0, 1]]), r"label 50, .*vocabulary has 50 tokens"),
    "causal token": (gpt2, torch.tensor([[0, 50], [0, 1]]), r"label 50, which GPT2LMHeadModel cannot have"),
    "padding of -1": (gpt2, torch.tensor([[4, -1], [0, 1]]), r"label -1, .*-100 marks a label that is ignored"),
}


@pytest.mark.parametrize("case", GOOD)
def test_labels_that_a_model_takes_pass_and_train(case):
    make, labels = GOOD[case]
    model, batch = make(), {"input_ids": IDS, "labels": labels}
    check_batch(batch, model, OWN, "training")
    model(**batch).loss.backward()


@pytest.mark.parametrize("case", BAD)
def test_labels_that_a_model_cannot_take_are_refused_as_it_would_itself(case):
    make, labels, message = BAD[case]
    model, batch = make(), {"input_ids": IDS, "labels": labels}
    with pytest.raises(DataError, match=message):
        check_batch(batch, model, OWN, "training")
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        model(**batch).loss.backward()


def test_labels_are_free_where_a_function_computes_the_loss():
    make, labels, _ = BAD["class too high"]
    batch = {"input_ids": IDS, "labels": labels}
    check_batch(batch, make(), SimpleNamespace(label_names=("labels",), compute_loss_func=len), "training")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 50]]), r"reach from 1 to 50, but BertForMaskedLM has embeddings for 0 to 49.*resize_token_embeddings"),
        (torch.tensor([[-1, 5]]), r"reach from -1 to 5"),
        (torch.tensor([[1.0, 5.0]]), r"input_ids of the training set are torch.float32"),
    ],
)
def test_ids_must_be_in_the_vocabulary(ids, message):
    model = bert("MaskedLM")
    with pytest.raises(DataError, match=message):
        check_batch({"input_ids": ids, "labels": torch.zeros_like(ids).long()}, model, OWN, "training")
    model.resize_token_embeddings(60)
    check_batch({"input_ids": torch.tensor([[1, 59]]), "labels": torch.tensor([[59, -100]])}, model, OWN, "training")


def test_models_of_peft_are_unwrapped():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert("SequenceClassification", num_labels=3), peft.LoraConfig(task_type="SEQ_CLS"))
    check_batch({"input_ids": IDS, "labels": ONE}, model, OWN, "training")
    with pytest.raises(DataError, match="BertForSequenceClassification cannot have"):
        check_batch({"input_ids": IDS, "labels": ONE + 1}, model, OWN, "training")


def test_images_have_no_vocabulary():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=3
    )
    model = transformers.ViTForImageClassification(config)
    check_batch({"pixel_values": torch.zeros(2, 3, 32, 32), "labels": ONE}, model, OWN, "training")
    with pytest.raises(DataError, match="has the label 3"):
        check_batch({"pixel_values": torch.zeros(2, 3, 32, 32), "labels": ONE + 1}, model, OWN, "training")


def late(number):
    return [{"input_ids": [1, 2], "label": 0} for _ in range(50)] + [{"input_ids": [1, 2], "label": number}]


@pytest.mark.parametrize("kind", ["list", "table", "selected"])
def test_a_class_of_a_late_example_is_found(kind):
    datasets = pytest.importorskip("datasets")
    model = bert("SequenceClassification", num_labels=3)

    def data(number):
        if kind == "list":
            return late(number)
        table = datasets.Dataset.from_list(late(number))
        return table.select([50, *range(20)]).select([4, 5, 6, 7, 0]).with_format("torch") if kind == "selected" else table

    check(data(2), model)
    with pytest.raises(DataError, match="training set has the label 3, which BertForSequenceClassification cannot have"):
        check(data(3), model)
    check(data(3), model, loss=SimpleNamespace(label_names=("labels",), compute_loss_func=len))
    check(data(3), model, labelled=False)
    check(
        data(3), model, collator=lambda batch: default_data_collator([each | {"label": int(each["label"]) % 3} for each in batch])
    )


@pytest.mark.parametrize("label", [0.5, [0.0, 1.0, 1.0]])
def test_other_labels_are_checked_in_the_first_examples_only(label):
    model = bert("SequenceClassification", num_labels=1 if label == 0.5 else 3)
    check([{"input_ids": [1, 2], "labels": label}] * 9, model)
    datasets = pytest.importorskip("datasets")
    check(datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": label}] * 9), model)
