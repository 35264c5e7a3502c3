import copy
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.data import DataLoader

from fts.errors import ArgumentError, BatchError, DataError, LossError
from fts.trainer import Trainer, TrainingArguments, default_data_collator
from fts.trainer.evaluation.config import EvaluationConfig, dataset_length, evaluation_config
from fts.trainer.evaluation.loop import run_evaluation
from fts.trainer.evaluation.prediction import PredictionConfig, predict_batch
from fts.trainer.evaluation.pytree import tree_leaves_with_path, tree_map
from fts.trainer.model.label_counts import loss_denominator
from fts.trainer.model.modes import evaluation_mode
from tests.trainer.helpers import Linear, arguments, make_examples, make_trainer


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


def test_metrics_are_the_same_at_every_batch_size():
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
    output = make_trainer(tmp_path, Linear()).predict([{"x": row["x"]} for row in make_examples(5)])
    assert output.label_ids is None
    assert output.predictions.shape == (5,)
    assert output.metrics.keys() == {"test_runtime", "test_samples_per_second", "test_steps_per_second"}


def test_several_evaluation_sets_and_prefixes(tmp_path):
    trainer = make_trainer(tmp_path, Linear(), eval_dataset={"easy": make_examples(3), "hard": make_examples(5)})
    metrics = trainer.evaluate()
    assert {"eval_easy_loss", "eval_hard_loss"} <= metrics.keys()
    assert "final_loss" in trainer.evaluate(make_examples(3), metric_key_prefix="final")


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
    with pytest.raises(ArgumentError, match="valuation needs data: Trainer"):
        make_trainer(tmp_path, eval_dataset=None).evaluate()
    with pytest.raises(ArgumentError, match="compute_metrics returned float"):
        make_trainer(tmp_path, compute_metrics=lambda prediction: 0.5).evaluate()
    with pytest.raises(ArgumentError, match="metric_for_best_model='f1' is not one of the metrics of the evaluation: eval_loss"):
        make_trainer(tmp_path, eval_strategy="epoch", metric_for_best_model="f1").train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "f1"}, "'f1' is not one of .*: eval_loss, eval_runtime,"),
        (
            {"metric_for_best_model": "loss", "eval_dataset": {"easy": make_examples(3), "hard": make_examples(3)}},
            "'loss' is not one of .*: eval_easy_loss, .*eval_hard_loss",
        ),
        (
            {
                "metric_for_best_model": "f1",
                "eval_dataset": {"easy": make_examples(3)},
                "compute_metrics": lambda prediction: {"f1": 1.0},
            },
            "'f1' is not one of .*: eval_easy_loss",
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
            "eval_dataset": {"easy": make_examples(3)},
            "compute_metrics": lambda prediction: {"f1": 1.0},
        },
        {"metric_for_best_model": "eval_easy_loss", "eval_dataset": {"easy": make_examples(3), "hard": make_examples(3)}},
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
    assert Own(Linear(), args, train_dataset=make_examples(8), eval_dataset=make_examples(4)).train().global_step == 1


def test_names_of_metrics_are_checked(tmp_path):
    for metrics, message in (
        ({"f1": "high"}, "'f1'.*number"),
        ({"loss": 1.0}, "returned 'loss'"),
        ({"runtime": 1.0}, "'runtime'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make_trainer(tmp_path, compute_metrics=lambda prediction, metrics=metrics: metrics).evaluate()


@pytest.mark.parametrize("options", [{}, {"compute_metrics": lambda prediction: {"f1": 1.0}}])
def test_an_evaluation_without_labels_warns(tmp_path, caplog, options):
    trainer = make_trainer(tmp_path, Linear(), eval_dataset=[{"x": row["x"]} for row in make_examples(5)], **options)
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate()
        assert "eval_loss" not in metrics
    assert "no labels" in caplog.text
    assert "label_names" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer.predict([{"x": row["x"]} for row in make_examples(5)])
    assert caplog.text == ""


def test_evaluation_and_prediction_keep_every_example(tmp_path):
    full = make_trainer(tmp_path, Linear(), per_device_eval_batch_size=4)
    dropping = make_trainer(tmp_path, Linear(), per_device_eval_batch_size=4, dataloader_drop_last=True)
    assert dropping.evaluate()["eval_loss"] == full.evaluate()["eval_loss"]
    assert dropping.predict(make_examples(3)).predictions.shape == (3,)
    assert len(dropping.get_eval_dataloader()) == 3
    assert len(dropping.get_train_dataloader()) == 5


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


# run_evaluation, without a Trainer


def own_loss(model, inputs):
    outputs = model(**inputs)
    return outputs["loss"] if isinstance(outputs, dict) else outputs[0], outputs


def predicting(model, label_names=("labels",), **options):
    return lambda inputs: predict_batch(model, inputs, PredictionConfig(own_loss, label_names), **options)


def evaluated(model, batches, *, label_names=("labels",), only_loss=False, **options):
    config = EvaluationConfig(**({"loss_weight": lambda batch: loss_denominator(model, batch, label_names)} | options))
    with evaluation_mode(model):
        return run_evaluation(predicting(model, label_names, prediction_loss_only=only_loss), batches, config=config)


def batches_of(data, size, collate=pad):
    return DataLoader(data, batch_size=size, collate_fn=collate)


def by_hand(model, data):
    """The mean loss over all labels, the accuracy, and each row's logits; sentence by sentence."""
    losses, right, logits = [], [], []
    with torch.no_grad():
        for example in data:
            logits_of_example = model(example["input_ids"][None])["logits"][0]
            losses += nn.functional.cross_entropy(logits_of_example, example["labels"], reduction="none").tolist()
            right += (logits_of_example.argmax(-1) == example["labels"]).tolist()
            logits.append(logits_of_example.numpy())
    return float(np.mean(losses)), float(np.mean(right)), logits


def accuracy(prediction):
    counted = prediction.label_ids != -100
    return {"accuracy": (prediction.predictions[0].argmax(-1) == prediction.label_ids)[counted].mean()}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 5))
def test_metrics_equal_a_computation_by_hand(count, size, seed):
    torch.manual_seed(seed)
    model, data = Tagger(), sentences(count)
    loss, right, logits = by_hand(model, data)
    output = evaluated(model, batches_of(data, size), compute_metrics=accuracy)
    assert output.metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert output.metrics["eval_accuracy"] == pytest.approx(right)
    assert output.num_samples == count
    assert len(output.predictions[0]) == len(output.label_ids) == count
    for index, (row, expected, labels, example) in enumerate(
        zip(output.predictions[0], logits, output.label_ids, data, strict=True)
    ):
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=1e-5)
        first = index - index % size  # within a batch the model itself answers to the padding of its examples
        widest = max(len(other) for other in logits[first : first + size])
        assert (row[widest:] == -100).all() and (row[:widest] != -100).all()
        assert labels[labels != -100].tolist() == example["labels"].tolist()


@pytest.mark.parametrize("form", ["loader", "list", "generator", "own loader", "iterable dataset"])
def test_batches_come_from_anything(form):
    model, data = Tagger(), sentences(10)
    loader = batches_of(data, 4)

    class Own:
        def __iter__(self):
            return iter(loader)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data)

    batches = {
        "loader": loader,
        "list": list(loader),
        "generator": (batch for batch in loader),
        "own loader": Own(),
        "iterable dataset": batches_of(Stream(), 4),
    }[form]
    expected = evaluated(model, loader, compute_metrics=accuracy)
    found = evaluated(model, batches, compute_metrics=accuracy)
    assert found.metrics == expected.metrics
    assert found.num_samples == 10
    np.testing.assert_array_equal(found.predictions[0], expected.predictions[0])


def test_the_number_of_examples_is_known_where_data_has_a_length():
    class Sized(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

        def __len__(self):
            raise NotImplementedError

    assert dataset_length(batches_of([1, 2, 3], 2)) == 3
    assert dataset_length(DataLoader(Sized())) is None
    assert dataset_length(iter([])) is None


def test_no_batch_is_an_error():
    with pytest.raises(DataError, match="There is no batch to evaluate"):
        evaluated(Tagger(), [])


def test_the_loss_alone():
    model, data = Tagger(), sentences(9)
    calls = []
    output = evaluated(model, batches_of(data, 4), only_loss=True, compute_metrics=calls.append)
    assert output.predictions is None and output.label_ids is None
    assert output.metrics == {"eval_loss": pytest.approx(by_hand(model, data)[0], rel=1e-5)}
    assert calls == []


@pytest.mark.parametrize("size", [1, 7, 64])
def test_metrics_batch_by_batch(size):
    model, data = Tagger(), sentences()
    right, flags = [], []

    def compute_metrics(prediction, compute_result):
        assert isinstance(prediction.predictions[0], torch.Tensor)
        counted = prediction.label_ids != -100
        right.extend((prediction.predictions[0].argmax(-1) == prediction.label_ids)[counted].tolist())
        flags.append(compute_result)
        return {"accuracy": np.mean(right)} if compute_result else None

    output = evaluated(model, batches_of(data, size), compute_metrics=compute_metrics, batch_eval_metrics=True, keep=False)
    batches = math.ceil(len(data) / size)
    assert flags == [False] * (batches - 1) + [True]
    assert output.metrics["eval_accuracy"] == pytest.approx(by_hand(model, data)[1])
    assert output.predictions is None and output.label_ids is None
    kept = evaluated(model, batches_of(data, size), compute_metrics=compute_metrics, batch_eval_metrics=True)
    assert kept.predictions[0].shape[0] == len(data)  # predict gives the arrays, too


def test_metrics_batch_by_batch_get_inputs_and_losses():
    seen = []

    def compute_metrics(prediction, compute_result):
        seen.append((prediction.inputs["input_ids"].shape[0], prediction.losses.tolist()))
        return {}

    options = {"batch_eval_metrics": True, "keep": False, "main_input_name": "input_ids", "include_losses": True}
    evaluated(Tagger(), batches_of(sentences(5), 3), compute_metrics=compute_metrics, **options)
    assert [(size, len(losses), len(set(losses))) for size, losses in seen] == [(3, 3, 1), (2, 2, 1)]


def test_inputs_and_losses_for_metrics():
    model, data = Tagger(), sentences(7)
    found = []
    evaluated(
        model,
        batches_of(data, 3),
        compute_metrics=lambda p: found.append(p) or {},
        main_input_name="input_ids",
        include_losses=True,
    )
    (prediction,) = found
    predictions, labels, inputs, losses = prediction
    assert inputs.shape[0] == labels.shape[0] == predictions[0].shape[0] == 7
    for row, example in zip(inputs, data, strict=True):
        assert row[: len(example["input_ids"])].tolist() == example["input_ids"].tolist()
    batch_losses = [float(predicting(model)(batch)[0]) for batch in batches_of(data, 3)]
    np.testing.assert_allclose(losses, np.repeat(batch_losses, [3, 3, 1]), rtol=1e-6)
    with pytest.raises(BatchError, match=r"needs batch\['pixels'\], but the batch has input_ids, labels.*main_input_name"):
        evaluated(model, batches_of(data, 3), main_input_name="pixels")


def test_batches_can_be_kept_separate():
    model, data = Tagger(), sentences(5)
    found = []
    options = {"concat_batches": False, "compute_metrics": lambda p: found.append(p) or {}, "include_losses": True}
    output = evaluated(model, batches_of(data, 2), **options)
    assert [part[0].shape[0] for part in output.predictions] == [2, 2, 1]
    assert [part.shape[0] for part in output.label_ids] == [2, 2, 1]
    assert [part.shape for part in found[0].losses] == [(2,), (2,), (1,)]
    assert output.metrics["eval_loss"] == pytest.approx(by_hand(model, data)[0], rel=1e-5)


def test_detections_of_any_number_can_be_kept_separate():
    batches = [{"x": torch.ones(size, 2)} for size in (3, 2)]

    def predict(inputs):
        boxes = [{"boxes": torch.ones(index + 1, 4)} for index in range(len(inputs["x"]))]
        return torch.tensor(1.0), (inputs["x"],), boxes

    output = run_evaluation(predict, batches, config=EvaluationConfig(concat_batches=False))
    assert [[part["boxes"].shape[0] for part in batch] for batch in output.label_ids] == [[1, 2, 3], [1, 2]]
    with pytest.raises(BatchError, match="eval_do_concat_batches=False"):
        run_evaluation(predict, batches, config=EvaluationConfig())


def test_logits_are_preprocessed_before_they_are_kept():
    given = []

    def shrink(logits, labels):
        given.append(None if labels is None else labels.shape)
        return logits[0].argmax(-1)

    data = sentences(5)
    output = evaluated(Tagger(), batches_of(data, 2), preprocess_logits=shrink)
    assert output.predictions.dtype == np.int64 and output.predictions.ndim == 2
    assert [shape[0] for shape in given] == [2, 2, 1]
    bare = [{"input_ids": batch["input_ids"]} for batch in batches_of(data, 2)]
    given.clear()
    assert evaluated(Tagger(), bare, preprocess_logits=shrink).label_ids is None
    assert given == [None] * 3


def losses_of(values, weights=None, **settings):
    batches = [torch.ones(2) for _ in values]
    numbers, given = iter(values), iter(weights or [2] * len(values))
    config = EvaluationConfig(loss_weight=lambda batch: next(given), **settings)
    return run_evaluation(lambda batch: (next(numbers), None, None), batches, config=config).metrics.get("eval_loss")


def test_losses_are_weighed():
    nan, one, four = (torch.tensor(value) for value in (math.nan, 1.0, 4.0))
    assert losses_of([one, four], [3, 1]) == 1.75
    assert losses_of([one, four], [torch.tensor(3), torch.tensor(1)]) == 1.75
    assert losses_of([one, nan], [1, 0]) == 1.0  # the mean of no labels
    assert math.isnan(losses_of([one, nan]))
    assert losses_of([one, nan, four], skip_nonfinite=True) == 2.5
    assert math.isnan(losses_of([nan, nan], skip_nonfinite=True))
    assert math.isnan(losses_of([nan], [0]))
    assert losses_of([one, None]) == 1.0
    assert losses_of([None, None]) is None
    assert losses_of([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0, 0.0])]) == 1.75  # by row, and some other shape
    with pytest.raises(LossError, match="prediction_step returned float"):
        losses_of([1.0])


def test_the_sum_of_many_losses_is_exact():
    count = 20_000
    loss = losses_of([torch.tensor(0.1)] * count, [1] * count)
    assert loss == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_a_metric_may_be_called_loss_where_there_is_none():
    def run(loss):
        config = EvaluationConfig(compute_metrics=lambda prediction: {"loss": 3.0})
        return run_evaluation(lambda batch: (loss, batch, batch), [torch.ones(2)], config=config).metrics

    assert run(None) == {"eval_loss": 3.0}
    with pytest.raises(ArgumentError, match="there is another eval_loss"):
        run(torch.tensor(1.0))


def test_on_batch_is_called_for_each_batch():
    trainer_state = []
    evaluated(Tagger(), batches_of(sentences(5), 2), on_batch=lambda: trainer_state.append(1))
    assert len(trainer_state) == 3


def test_large_results_lie_in_a_file(tmp_path):
    model, data = Tagger(), sentences(20)
    expected = evaluated(model, batches_of(data, 3), compute_metrics=accuracy)
    found = evaluated(model, batches_of(data, 3), compute_metrics=accuracy, memory_limit=100, directory=tmp_path)
    assert found.metrics == expected.metrics
    np.testing.assert_array_equal(found.predictions[0], expected.predictions[0])
    assert list(tmp_path.iterdir()) == []


def test_batches_stay_on_the_device_as_long_as_asked():
    # the CPU's batches are written at once in any case, so only the result is compared; see test_output_containers
    model, data = Tagger(), sentences(9)
    expected = evaluated(model, batches_of(data, 2))
    for batches in (1, 2, 100):
        np.testing.assert_array_equal(
            evaluated(model, batches_of(data, 2), accumulation_steps=batches).label_ids, expected.label_ids
        )


def test_a_prediction_step_may_change_its_batch():
    model, data = Tagger(), sentences(5)

    def predict(inputs):
        labels = inputs.pop("labels")
        outputs = model(inputs.pop("input_ids"), labels)
        return outputs["loss"], outputs["logits"], labels

    config = EvaluationConfig(loss_weight=lambda batch: loss_denominator(model, batch, ["labels"]), main_input_name="input_ids")
    output = run_evaluation(predict, batches_of(data, 2), config=config)
    assert output.num_samples == 5
    assert output.metrics["eval_loss"] == pytest.approx(by_hand(model, data)[0], rel=1e-5)


def test_no_gradients_and_each_module_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(child.training for child in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [child.training for child in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()


class Tied(nn.Module):
    """A tie, a recurrent layer with its second list of weights, and buffers of two kinds."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.lstm = nn.LSTM(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.second(self.lstm(self.first(x))[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_evaluation_in_half_precision_gives_the_weights_back(dtype):
    torch.manual_seed(0)
    model = Tied()
    x = torch.randn(3, 4)
    half = copy.deepcopy(model).to(dtype).eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: (tensor, tensor.data_ptr(), tensor.detach().clone()) for name, tensor in tensors.items()}
    model.first.weight.grad = torch.ones(4, 4)
    fired = []
    model.first.weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(1))
    before = model.eval()(x)
    model.train()
    with evaluation_mode(model, dtype):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.second.weight is model.first.weight
        assert torch.equal(model(x.to(dtype)), half(x.to(dtype)))
        assert model.norm.num_batches_tracked.dtype == torch.int64
        for tensor, pointer, values in state.values():  # what shares the model's storage sees nothing of it
            assert tensor.data_ptr() == pointer and torch.equal(tensor, values)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, (tensor, pointer, values) in state.items():
        assert now[name] is tensor and tensor.data_ptr() == pointer and torch.equal(tensor, values)
    assert torch.equal(model.first.weight.grad, torch.ones(4, 4))
    assert torch.equal(model.eval()(x), before)
    model(x).sum().backward()
    assert fired == [1]


def test_the_configuration_of_arguments():
    args = SimpleNamespace(
        include_for_metrics=["inputs", "loss"],
        batch_eval_metrics=True,
        eval_do_concat_batches=False,
        logging_nan_inf_filter=True,
        eval_accumulation_steps=3,
    )
    model = Tagger()
    batch = pad(sentences(4))
    own = EvaluationConfig(prefix="test", keep=False)
    config = evaluation_config(own, args, model, ["labels"])
    assert (config.prefix, config.keep, config.concat_batches, config.accumulation_steps) == ("test", False, False, 3)
    assert config.batch_eval_metrics and config.include_losses and config.skip_nonfinite
    assert config.main_input_name == "input_ids"
    assert int(config.loss_weight(batch)) == int((batch["labels"] != -100).sum())
    assert config.loss_weight([torch.ones(3)]) == 3
    model.main_input_name = "pixels"
    assert evaluation_config(EvaluationConfig(prefix="test"), args, model, []).main_input_name == "pixels"
    args.batch_eval_metrics, args.include_for_metrics = False, []
    plain = evaluation_config(own, args, model, ["labels"])
    assert plain.keep and plain.main_input_name is None and not plain.include_losses


# Against transformers


def same(ours, theirs):
    mine, other = dict(tree_leaves_with_path(ours)), dict(tree_leaves_with_path(theirs))
    assert mine.keys() == other.keys()
    for path, array in other.items():
        assert mine[path].shape == array.shape and mine[path].dtype == array.dtype
        np.testing.assert_allclose(mine[path], array, rtol=1e-5, atol=1e-6)


def their_output(model, data, tmp_path, size, collate=None, **options):
    transformers = pytest.importorskip("transformers")
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_eval_batch_size": size}
    names = ("label_names", "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_accumulation_steps")
    settings |= {name: options.pop(name) for name in names if name in options}
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), **settings), data_collator=collate, **options
    )
    loader = trainer.get_eval_dataloader(data)

    def compute_loss(model, inputs):
        count = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
        return trainer.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=count)

    def predict(inputs):
        return predict_batch(model, inputs, PredictionConfig(compute_loss, trainer.label_names))

    return trainer.evaluation_loop(loader, "Evaluation"), trainer, loader, predict


def compare(model, data, tmp_path, size, collate=None, **options):
    metrics, preprocess = options.get("compute_metrics"), options.get("preprocess_logits_for_metrics")
    theirs, trainer, loader, predict = their_output(model, data, tmp_path, size, collate, **options)
    own = EvaluationConfig(keep=False, compute_metrics=metrics, preprocess_logits=preprocess)
    config = evaluation_config(own, trainer.args, model, trainer.label_names)
    with evaluation_mode(model):
        ours = run_evaluation(predict, loader, config)
    same(ours.predictions, theirs.predictions)
    same(ours.label_ids, theirs.label_ids)
    assert ours.num_samples == theirs.num_samples
    assert ours.metrics.keys() == theirs.metrics.keys() - {"eval_model_preparation_time"}
    return ours.metrics, theirs.metrics


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def words(count=24):
    ids = torch.randint(1, 20, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


def right(prediction):
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": (logits.argmax(-1) == prediction.label_ids).mean(), "eval_size": len(prediction.label_ids)}


@pytest.mark.parametrize("size", [1, 5, 8, 24])
@pytest.mark.parametrize("outputs", [{}, {"return_dict": False}, {"output_hidden_states": True}])
def test_a_classifier_is_evaluated_as_by_transformers(tmp_path, outputs, size):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, num_labels=3, **SMALL, **outputs))
    ours, theirs = compare(model, words(), tmp_path, size, compute_metrics=right)
    for name in ("eval_loss", "eval_accuracy", "eval_size"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_causal_model_is_evaluated_as_by_transformers_but_for_the_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sentences(24) if len(row["labels"]) > 1]
    ours, theirs = compare(model, data[:20], tmp_path, 5, collate=pad)
    # transformers weighs batches by their examples, not by their tokens
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=0.1)
    assert ours["eval_loss"] != pytest.approx(theirs["eval_loss"], rel=1e-4)
    equal = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in words(20)]
    ours, theirs = compare(model, equal, tmp_path, 5)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)


class Forms(nn.Module):
    """Outputs in tuples or dictionaries, nested, and of the length of the sentence."""

    def __init__(self, form):
        super().__init__()
        self.embedding = nn.Embedding(20, 3)
        self.form = form

    def forward(self, input_ids, labels=None):
        logits = self.embedding(input_ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self.form(loss, logits)


@pytest.mark.parametrize(
    "form",
    [
        lambda loss, logits: (loss, logits),
        lambda loss, logits: (loss, logits, (logits.mean(-1), {"pooled": logits.mean(1)})),
        lambda loss, logits: {"loss": loss, "heads": {"a": logits, "b": [logits.mean(1), (logits,)]}, "logits": logits},
        lambda loss, logits: {"loss": loss, "logits": logits, "scale": logits.mean(), "answers": logits.repeat(2, 1, 1)},
    ],
)
def test_any_form_and_length_is_evaluated_as_by_transformers(tmp_path, form):
    compare(Forms(form), sentences(24), tmp_path, 4, collate=pad)
    compare(Forms(form), sentences(24), tmp_path, 4, collate=pad, eval_accumulation_steps=2)
    compare(Forms(form), sentences(24), tmp_path, 4, collate=pad, eval_do_concat_batches=False)


def test_what_metrics_are_given_is_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, num_labels=3, **SMALL))
    seen = []

    def look(prediction):
        seen.append(tuple(prediction))
        return {}

    compare(model, words(22), tmp_path, 4, compute_metrics=look, include_for_metrics=["inputs", "loss"])
    same(seen[1], seen[0])
    seen.clear()

    def batchwise(prediction, compute_result):
        seen.append((*prediction, compute_result))
        return {"last": float(compute_result)}

    options = {"include_for_metrics": ["loss", "inputs"], "batch_eval_metrics": True}
    compare(model, words(22), tmp_path, 4, compute_metrics=batchwise, **options)
    theirs, ours = seen[:6], seen[6:]
    assert len(ours) == 6
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[-1] == other[-1]
        assert type(mine[2]) is type(other[2]) is dict  # the complete batch
        same(tree_map(np.asarray, mine[:4]), tree_map(np.asarray, other[:4]))
