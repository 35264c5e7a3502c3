"""Evaluation and prediction: the same metrics and arrays, and where they differ, by how much and why."""

import numpy as np
import pytest
import torch
import transformers

from tests.trainer.parity.compare import OURS, SIDES, THEIRS, assert_same_metrics, assert_same_training, both, entries, made, make
from tests.trainer.parity.models import Plain, accuracy, bert, llama, sentences, t5, texts


def classes(model):
    return {"train_dataset": sentences(), "eval_dataset": sentences(12, seed=1), "compute_metrics": accuracy}


WHEN = {
    "by steps": {"eval_strategy": "steps", "eval_steps": 3},
    "by a share of the steps": {"eval_strategy": "steps", "eval_steps": 0.3},
    "by epochs": {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "delayed": {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5},
    "delayed by epochs": {"eval_strategy": "epoch", "eval_delay": 2, "max_steps": -1, "num_train_epochs": 3},
    "at the start": {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
    "in batches of the size of the set": {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 12},
    "loss only": {"eval_strategy": "steps", "eval_steps": 4, "prediction_loss_only": True},
    "moved to the CPU on the way": {"eval_strategy": "steps", "eval_steps": 4, "eval_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", WHEN)
def test_evaluation_in_training(name, tmp_path, capsys):
    theirs, ours = both(tmp_path, Plain(), classes, **WHEN[name])
    assert_same_training(theirs, ours)
    expected, found = entries(theirs, "eval_loss"), entries(ours, "eval_loss")
    assert len(found) == len(expected) > 0
    for one, other in zip(expected, found, strict=True):
        assert_same_metrics(one, other)


def test_evaluate_and_predict(tmp_path, capsys):
    theirs, ours = made(tmp_path, bert(), classes)
    assert_same_metrics(theirs.evaluate(), ours.evaluate())
    assert_same_metrics(theirs.evaluate(sentences(7)), ours.evaluate(sentences(7)))
    assert_same_metrics(theirs.evaluate(metric_key_prefix="dev"), ours.evaluate(metric_key_prefix="dev"))
    one, other = (trainer.predict(sentences(13)) for trainer in (theirs, ours))
    np.testing.assert_allclose(other.predictions, one.predictions, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(other.label_ids, one.label_ids)
    assert_same_metrics(one.metrics, other.metrics)
    assert other._fields == one._fields


def test_several_sets(tmp_path, capsys):
    def parts(model):
        sets = {"easy": sentences(10, seed=1), "hard": sentences(10, seed=2)}
        return {"train_dataset": sentences(), "eval_dataset": sets, "compute_metrics": accuracy}

    theirs, ours = both(tmp_path, Plain(), parts, eval_strategy="steps", eval_steps=4)
    expected, found = ([e for e in t.state.log_history if any(k.startswith("eval_") for k in e)] for t in (theirs, ours))
    for one, other in zip(expected, found, strict=True):
        assert_same_metrics(one, other)
    assert_same_metrics(theirs.evaluate(), ours.evaluate())
    assert_same_metrics(theirs.evaluate("hard"), ours.evaluate("hard"))


def token_losses(folder, examples):
    """The loss of each batch of 5, and how many tokens it has."""
    model = make(OURS, folder, llama(), lambda model: {}).model.eval()
    means, counts = [], []
    for start in range(0, len(examples), 5):
        batch = {name: torch.stack([row[name] for row in examples[start : start + 5]]) for name in examples[0]}
        with torch.no_grad():
            means.append(model(**batch).loss.item())
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
    return np.array(means), np.array(counts)


def test_the_loss_of_tokens_is_their_mean_and_not_that_of_batches(tmp_path, capsys):
    """Deliberate: transformers averages batches' means by examples, fts all tokens, so that the batch size does not matter."""
    examples = texts(10, seed=1)
    means, counts = token_losses(tmp_path, examples)
    theirs, ours = made(tmp_path, llama(), lambda model: {"eval_dataset": examples})
    assert theirs.evaluate()["eval_loss"] == pytest.approx(means.mean(), rel=1e-5)
    by_tokens = (means * counts).sum() / counts.sum()
    assert ours.evaluate()["eval_loss"] == pytest.approx(by_tokens, rel=1e-5)
    assert abs(by_tokens - means.mean()) > 1e-4
    larger = make(OURS, tmp_path, llama(), lambda model: {"eval_dataset": examples}, per_device_eval_batch_size=10)
    assert larger.evaluate()["eval_loss"] == pytest.approx(by_tokens, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_batch_of_tokens_has_the_same_loss(smoothing, tmp_path, capsys):
    options = {"per_device_eval_batch_size": 10, "label_smoothing_factor": smoothing}
    theirs, ours = made(tmp_path, llama(), lambda model: {"eval_dataset": texts(10)}, **options)
    assert_same_metrics(theirs.evaluate(), ours.evaluate())


def test_batches_kept_apart(tmp_path, capsys):
    seen = {side.name: [] for side in SIDES}

    def parts_for(side):
        def metrics(prediction):
            seen[side.name].append(prediction)
            return {"batches": len(prediction.predictions)}

        return lambda model: {"eval_dataset": sentences(12), "compute_metrics": metrics}

    for side in SIDES:
        make(side, tmp_path, bert(), parts_for(side), eval_do_concat_batches=False).evaluate()
    one, other = seen["transformers"][0], seen["fts"][0]
    assert [part.shape for part in other.predictions] == [part.shape for part in one.predictions]
    for expected, found in zip(one.label_ids, other.label_ids, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_inputs_and_losses_for_metrics(tmp_path, capsys):
    seen = {}

    def parts_for(side):
        def metrics(prediction):
            seen[side.name] = prediction
            return {}

        return lambda model: {"eval_dataset": sentences(10), "compute_metrics": metrics}

    for side in SIDES:
        make(side, tmp_path, bert(), parts_for(side), include_for_metrics=["inputs", "loss"]).evaluate()
    np.testing.assert_array_equal(seen["fts"].inputs, seen["transformers"].inputs)
    np.testing.assert_allclose(seen["fts"].losses, seen["transformers"].losses, rtol=1e-5)
    assert len(list(seen["fts"])) == len(list(seen["transformers"]))


def test_metrics_by_batches(tmp_path, capsys):
    class Sums:
        def __init__(self):
            self.right = self.count = 0

        def __call__(self, prediction, compute_result=False):
            self.right += int((prediction.predictions.argmax(-1) == prediction.label_ids).sum())
            self.count += len(prediction.label_ids)
            return {"accuracy": self.right / self.count, "count": self.count} if compute_result else {}

    def parts(model):
        return {"eval_dataset": sentences(12), "compute_metrics": Sums()}

    theirs, ours = made(tmp_path, bert(), parts, batch_eval_metrics=True)
    one, other = theirs.evaluate(), ours.evaluate()
    assert_same_metrics(one, other)
    assert other["eval_count"] == 12


def test_logits_are_processed_before_they_are_kept(tmp_path, capsys):
    def parts(model):
        return {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1) * 2 + 0 * labels}

    one, other = (trainer.predict(sentences(12)) for trainer in made(tmp_path, bert(), parts))
    np.testing.assert_array_equal(other.predictions, one.predictions)


def test_ragged_predictions_are_padded_with_minus_100(tmp_path, capsys):
    examples = texts(5, length=6) + texts(5, length=8)
    theirs, ours = made(tmp_path, llama(), lambda model: {})
    one, other = theirs.predict(examples), ours.predict(examples)
    assert other.predictions.shape == one.predictions.shape == (10, 8, 50)
    np.testing.assert_allclose(other.predictions, one.predictions, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(other.label_ids, one.label_ids)
    assert (other.predictions[:5, 6:] == -100).all()


def test_examples_without_labels(tmp_path, capsys):
    examples = [{name: value for name, value in row.items() if name != "labels"} for row in sentences(7)]
    one, other = (trainer.predict(examples) for trainer in made(tmp_path, bert(), lambda model: {}))
    np.testing.assert_allclose(other.predictions, one.predictions, rtol=1e-5, atol=1e-6)
    assert other.label_ids is one.label_ids is None
    assert "test_loss" not in other.metrics
    assert_same_metrics(one.metrics, other.metrics)


def test_ignored_outputs(tmp_path, capsys):
    model = bert(output_hidden_states=True)
    theirs, ours = made(tmp_path, model, lambda model: {})
    one, other = theirs.predict(sentences(5)), ours.predict(sentences(5))
    assert len(other.predictions) == len(one.predictions) == 2  # logits, hidden states
    one, other = (t.predict(sentences(5), ignore_keys=["hidden_states"]) for t in (theirs, ours))
    np.testing.assert_allclose(other.predictions, one.predictions, rtol=1e-5, atol=1e-6)


# Seq2Seq


def tokens(count=10):
    return lambda model: {"train_dataset": texts(), "eval_dataset": texts(count, seed=1), "compute_metrics": shape_of}


def shape_of(prediction):
    return {"rows": prediction.predictions.shape[0], "width": prediction.predictions.shape[1]}


GENERATION = {
    "greedy": {"generation_max_length": 7},
    "beams": {"generation_max_length": 7, "generation_num_beams": 2},
    "default length": {},
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation(name, tmp_path, capsys):
    options = {"family": "Seq2Seq", "predict_with_generate": True, "per_device_eval_batch_size": 10} | GENERATION[name]
    theirs, ours = made(tmp_path, t5(), tokens(), **options)
    one, other = theirs.predict(texts(10, seed=2)), ours.predict(texts(10, seed=2))
    np.testing.assert_array_equal(other.predictions, one.predictions)
    np.testing.assert_array_equal(other.label_ids, one.label_ids)
    if "generation_max_length" in options:  # else transformers' first call leaves a length behind in the model's configuration
        assert_same_metrics(theirs.evaluate(), ours.evaluate())
    one, other = theirs.predict(texts(10), max_length=5, num_beams=2), ours.predict(texts(10), max_length=5, num_beams=2)
    np.testing.assert_array_equal(other.predictions, one.predictions)


def test_generation_config(tmp_path, capsys):
    config = transformers.GenerationConfig(max_length=6, num_beams=2, decoder_start_token_id=0, pad_token_id=0)
    options = {"family": "Seq2Seq", "predict_with_generate": True, "generation_config": config}
    theirs, ours = made(tmp_path, t5(), tokens(), **options)
    one, other = theirs.predict(texts(10, seed=2)), ours.predict(texts(10, seed=2))
    np.testing.assert_array_equal(other.predictions, one.predictions)
    assert ours.model.generation_config.max_length == 6


def test_seq2seq_training(tmp_path, capsys):
    options = {"predict_with_generate": True, "generation_max_length": 6, "eval_strategy": "steps", "eval_steps": 4}
    theirs, ours = both(tmp_path, t5(), tokens(), family="Seq2Seq", per_device_eval_batch_size=10, **options)
    assert_same_training(theirs, ours)
    for one, other in zip(entries(theirs, "eval_loss"), entries(ours, "eval_loss"), strict=True):
        assert_same_metrics(one, other)


def test_the_sides_are_two():
    assert THEIRS.kind("Trainer") is not OURS.kind("Trainer")
