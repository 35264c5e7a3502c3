import logging

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from fts.errors import ArgumentError, BatchError
from fts.trainer import EvalPrediction, Trainer, TrainingArguments, default_data_collator
from fts.trainer.gathering import Gathered, Rows
from tests.trainer.helpers import Linear, arguments, make_trainer, rows


class Tagger(nn.Module):
    """Logits for each token; the loss is a mean over the labels that are not -100."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 3)

    def forward(self, input_ids, labels=None):
        logits = self.embedding(input_ids)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "pooled": logits.mean(1), "cache": None}


def sentences(count=23):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(1, 20, (length,), generator=generator), "labels": torch.arange(length) % 3}
        for length in lengths
    ]


def pad(examples):
    stack = nn.utils.rnn.pad_sequence
    return {
        "input_ids": stack([example["input_ids"] for example in examples], batch_first=True),
        "labels": stack([example["labels"] for example in examples], batch_first=True, padding_value=-100),
    }


def tagger(size, **options):
    torch.manual_seed(0)
    args = TrainingArguments("unused", per_device_eval_batch_size=size, use_cpu=True, disable_tqdm=True)
    return Trainer(Tagger(), args, data_collator=pad, **options)


def test_predictions_come_in_order_and_padded():
    data = sentences()
    trainer = tagger(4)
    output = trainer.predict(data)
    logits, pooled = output.predictions
    longest = max(len(example["labels"]) for example in data)
    assert logits.shape == (len(data), longest, 3)
    assert pooled.shape == (len(data), 3)
    for row, labels, example in zip(logits, output.label_ids, data, strict=True):
        length = len(example["labels"])
        expected = trainer.model(example["input_ids"][None])["logits"][0].detach().numpy()
        np.testing.assert_allclose(row[:length], expected, rtol=1e-6)
        assert labels[:length].tolist() == example["labels"].tolist()
        assert (labels[length:] == -100).all()


def test_figures_are_the_same_at_every_batch_size():
    seen = []

    def compute_metrics(prediction):
        counted = prediction.label_ids != -100
        return {"accuracy": (prediction.predictions[0].argmax(-1) == prediction.label_ids)[counted].mean()}

    for size in (1, 7, 23, 64):
        metrics = tagger(size, compute_metrics=compute_metrics).evaluate(sentences())
        assert isinstance(metrics["eval_accuracy"], float)
        seen.append((metrics["eval_loss"], metrics["eval_accuracy"]))
    for loss, accuracy in seen:
        assert loss == pytest.approx(seen[0][0], rel=1e-6)
        assert accuracy == seen[0][1]


def test_the_loss_of_a_causal_language_model_is_the_same_at_every_batch_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sentences() if len(row["labels"]) > 1]
    found = []
    for size in (1, 5, 64):
        torch.manual_seed(0)
        args = TrainingArguments(tmp_path, per_device_eval_batch_size=size, use_cpu=True, disable_tqdm=True)
        trainer = Trainer(transformers.GPT2LMHeadModel(config), args, data_collator=pad)
        found.append(trainer.evaluate(data)["eval_loss"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_ignored_keys_and_preprocessed_logits():
    output = tagger(4).predict(sentences(), ignore_keys=["pooled"])
    assert output.predictions.ndim == 3
    shrink = tagger(4, preprocess_logits_for_metrics=lambda logits, labels: logits[0].argmax(-1))
    assert shrink.predict(sentences()).predictions.ndim == 2


def test_without_labels_there_are_predictions_only(tmp_path):
    output = make_trainer(tmp_path, Linear()).predict([{"x": row["x"]} for row in rows(5)])
    assert output.label_ids is None
    assert output.predictions.shape == (5,)
    assert output.metrics.keys() == {"test_runtime", "test_samples_per_second", "test_steps_per_second"}


def test_several_evaluation_sets_and_prefixes(tmp_path):
    trainer = make_trainer(tmp_path, Linear(), eval_dataset={"easy": rows(3), "hard": rows(5)})
    metrics = trainer.evaluate()
    assert {"eval_easy_loss", "eval_hard_loss"} <= metrics.keys()
    assert "final_loss" in trainer.evaluate(rows(3), metric_key_prefix="final")


def test_evaluation_leaves_the_model_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    trainer.model.dropout.eval()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.evaluate()
    assert trainer.model.training
    assert not trainer.model.dropout.training
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in before.items())


def test_errors_of_evaluation(tmp_path):
    with pytest.raises(ArgumentError, match=r"Trainer.evaluate needs data"):
        make_trainer(tmp_path, eval_dataset=None).evaluate()
    with pytest.raises(ArgumentError, match="compute_metrics returned float"):
        make_trainer(tmp_path, compute_metrics=lambda prediction: 0.5).evaluate()
    with pytest.raises(ArgumentError, match="metric_for_best_model='f1' is not among the figures of the evaluation: eval_loss"):
        make_trainer(tmp_path, eval_strategy="epoch", metric_for_best_model="f1").train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "f1"}, "'f1' is not among .*: eval_loss, eval_runtime,"),
        (
            {"metric_for_best_model": "loss", "eval_dataset": {"easy": rows(3), "hard": rows(3)}},
            "'loss' is not among .*: eval_easy_loss, .*eval_hard_loss",
        ),
        (
            {
                "metric_for_best_model": "f1",
                "eval_dataset": {"easy": rows(3)},
                "compute_metrics": lambda prediction: {"f1": 1.0},
            },
            "'f1' is not among .*: eval_easy_loss",
        ),
    ],
)
def test_the_metric_of_the_best_is_checked_before_training(tmp_path, options, message):
    trainer = make_trainer(tmp_path, eval_strategy="epoch", **options)
    with pytest.raises(ArgumentError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "options",
    [
        {"metric_for_best_model": "eval_runtime"},
        {
            "metric_for_best_model": "easy_f1",
            "eval_dataset": {"easy": rows(3)},
            "compute_metrics": lambda prediction: {"f1": 1.0},
        },
        {"metric_for_best_model": "eval_easy_loss", "eval_dataset": {"easy": rows(3), "hard": rows(3)}},
        {"metric_for_best_model": "f1", "eval_strategy": "no"},
    ],
)
def test_metrics_that_can_be_there_are_accepted(tmp_path, options):
    assert make_trainer(tmp_path, max_steps=1, **({"eval_strategy": "steps"} | options)).train().global_step == 1


def test_an_overridden_evaluation_may_give_any_metric(tmp_path):
    class Own(Trainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_bleu": 1.0}

    args = arguments(tmp_path, max_steps=1, eval_strategy="steps", metric_for_best_model="bleu")
    assert Own(Linear(), args, train_dataset=rows(8), eval_dataset=rows(4)).train().global_step == 1


# What compute_metrics returns


@pytest.mark.parametrize("value", ["high", None, [0.5], {"a": 1.0}, np.zeros(2), torch.zeros(2), 1j, np.array("a")])
def test_a_metric_must_be_a_number(tmp_path, value):
    with pytest.raises(ArgumentError, match=r"compute_metrics returned .* for 'f1'.*number"):
        make_trainer(tmp_path, compute_metrics=lambda prediction: {"accuracy": 1.0, "f1": value}).evaluate()


def test_names_of_metrics_must_be_strings(tmp_path):
    with pytest.raises(ArgumentError, match="compute_metrics returned a figure named 3"):
        make_trainer(tmp_path, compute_metrics=lambda prediction: {3: 1.0}).evaluate()


def test_numbers_of_numpy_and_torch_become_pythons(tmp_path):
    values = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.array(3.0), "d": np.array([4.0]), "e": True, "eval_f": 1}
    metrics = make_trainer(tmp_path, compute_metrics=lambda prediction: values).evaluate()
    found = {name: metrics[f"eval_{name}"] for name in "abcdef"}
    assert found == {"a": 0.5, "b": 2, "c": 3.0, "d": 4.0, "e": True, "f": 1}
    assert {type(value) for value in found.values()} == {int, float, bool}


@pytest.mark.parametrize("name", ["loss", "eval_loss", "runtime", "eval_samples_per_second"])
def test_an_own_metric_cannot_hide_a_figure_of_the_evaluation(tmp_path, name):
    with pytest.raises(ArgumentError, match=f"compute_metrics returned '{name}'.*[Rr]ename"):
        make_trainer(tmp_path, compute_metrics=lambda prediction: {name: 1.0}).evaluate()


def test_two_metrics_cannot_have_one_name(tmp_path):
    with pytest.raises(ArgumentError, match=r"compute_metrics returned 'eval_f1'.*[Rr]ename"):
        make_trainer(tmp_path, compute_metrics=lambda prediction: {"f1": 1.0, "eval_f1": 2.0}).evaluate()


@pytest.mark.parametrize("options", [{}, {"compute_metrics": lambda prediction: {"f1": 1.0}}])
def test_an_evaluation_without_labels_warns(tmp_path, caplog, options):
    trainer = make_trainer(tmp_path, Linear(), eval_dataset=[{"x": row["x"]} for row in rows(5)], **options)
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate()
        assert "eval_loss" not in metrics
    assert "no labels" in caplog.text
    assert "label_names" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer.predict([{"x": row["x"]} for row in rows(5)])
    assert caplog.text == ""


def test_evaluation_and_prediction_keep_every_row(tmp_path):
    whole = make_trainer(tmp_path, Linear(), per_device_eval_batch_size=4)
    cut = make_trainer(tmp_path, Linear(), per_device_eval_batch_size=4, dataloader_drop_last=True)
    assert cut.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]
    assert cut.predict(rows(3)).predictions.shape == (3,)
    assert len(cut.get_eval_dataloader()) == 3
    assert len(cut.get_train_dataloader()) == 5


def test_eval_prediction_unpacks():
    prediction = EvalPrediction(predictions=1, label_ids=2)
    assert tuple(prediction) == (1, 2)
    assert prediction[1] == 2


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5),
    st.booleans(),
)
def test_gathered_rows_are_concatenated_and_padded(shapes, known):
    batches = [torch.arange(rows * width).reshape(rows, width) for rows, width in shapes]
    total = sum(len(batch) for batch in batches)
    gathered = Gathered(total if known else None)
    for batch in batches:
        gathered.add((batch, {"sums": batch.sum(1), "other": "text"}))
    arrays, sums = gathered.arrays()[0], gathered.arrays()[1]["sums"]
    width = max(width for _, width in shapes)
    expected = torch.cat([nn.functional.pad(batch, (0, width - batch.shape[1]), value=-100) for batch in batches])
    assert arrays.tolist() == expected.tolist()
    assert sums.tolist() == torch.cat([batch.sum(1) for batch in batches]).tolist()


def test_known_rows_are_allocated_once():
    rows = Rows(6)
    rows.add(torch.ones(2, 3))
    store = rows.store
    rows.add(torch.ones(4, 2))
    assert rows.store is store
    assert rows.array().base is not None or rows.array() is store
    with pytest.raises(BatchError, match="axes differ"):
        rows.add(torch.ones(2))
    assert Gathered(None).arrays() is None


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"x": [1.0]}, {"y": [1.0]}], "first example of a batch has 'x', another one lacks it"),
        ([{"x": [1.0]}, {"x": [1.0, 2.0]}], "'x' cannot be stacked .* Pad them"),
        ([(1, 2)], "An example of the data is a tuple"),
    ],
)
def test_collating_errors(examples, message):
    with pytest.raises(BatchError, match=message):
        default_data_collator(examples)


def test_collating_equals_transformers():
    theirs = pytest.importorskip("transformers").default_data_collator
    examples = [
        [{"x": [1, 2], "label": 1, "text": "a", "none": None}, {"x": [3, 4], "label": 0, "text": "b", "none": None}],
        [{"x": np.ones(2), "label": 0.5}, {"x": np.zeros(2), "label": 1.5}],
        [{"x": torch.ones(2), "label_ids": torch.tensor([1, 2])}, {"x": torch.ones(2), "label_ids": torch.tensor([3, 4])}],
        [{"x": torch.ones(2), "label": torch.tensor(1)}, {"x": torch.ones(2), "label": torch.tensor(0)}],
        [{"labels": 2.5, "x": True}, {"labels": 1.5, "x": False}],
    ]
    for batch in examples:
        ours, expected = default_data_collator(batch), theirs(batch)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor)


def test_datasets_lose_unused_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [[1.0, 2.0, 3.0, 4.0]] * 9, "labels": [1.0] * 9, "text": ["a"] * 9})
    trainer = make_trainer(tmp_path, Linear(), train_dataset=table, eval_dataset=table, max_steps=3)
    assert trainer.train().global_step == 3
    assert trainer.predict(table).predictions.shape == (9,)
    with pytest.raises(Exception, match="none of the training set's columns: they are text; it takes x, labels"):
        make_trainer(tmp_path, Linear(), train_dataset=table.select_columns(["text"])).train()
