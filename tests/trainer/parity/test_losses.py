"""The scale of the loss: over which labels its mean is taken when an update has several micro-batches, and what is logged."""

import copy
import math

import pytest
import torch
import transformers

from tests.trainer.parity.compare import OURS, SIDES, assert_same_training, assert_same_weights, both, entries, made, make
from tests.trainer.parity.models import Plain, bert, gpt2, llama, masked_bert, sentences, t5, texts


class WithoutLossKwargs(transformers.BertForSequenceClassification):
    """A model that says that it does not take `num_items_in_batch`."""

    accepts_loss_kwargs = False


def bert_without_loss_kwargs():
    model = WithoutLossKwargs(bert().config)
    model.load_state_dict(bert().state_dict())
    return model


def examples(kind="class"):
    return lambda model: {"train_dataset": sentences(kind=kind)}


def tokens(model):
    return {"train_dataset": texts()}


def shifted_tokens(model):
    # with smoothing the labels are kept from the model, which then cannot make its decoder's inputs of them
    start = [{"decoder_input_ids": torch.cat([torch.tensor([0]), row["labels"][:-1].clamp(min=0)])} for row in texts()]
    return {"train_dataset": [row | more for row, more in zip(texts(), start, strict=True)]}


# 30 examples in micro-batches of 4, 3 to an update: also a short micro-batch, and an update of fewer
CASES = {
    "causal, unequal token counts": (llama, tokens),
    "causal without a loss_type": (gpt2, tokens),
    "masked, unequal token counts": (masked_bert, tokens),
    "encoder-decoder": (t5, shifted_tokens),
    "classifier": (bert, examples()),
    "classifier without loss kwargs": (bert_without_loss_kwargs, examples()),
    "several classes": (lambda: bert(problem_type="multi_label_classification"), examples("several")),
    "regression": (lambda: bert(1), examples("number")),
    "plain module": (Plain, examples()),
}


@pytest.mark.parametrize("name", CASES)
def test_accumulation(name, tmp_path, capsys):
    model, parts = CASES[name]
    assert_same_training(*both(tmp_path, model(), parts, gradient_accumulation_steps=3, max_steps=6))


def test_token_count_is_that_of_the_update(tmp_path, capsys):
    """Three micro-batches are one batch of three times the size, for any token counts."""
    full = make(OURS, tmp_path, llama(), tokens, per_device_train_batch_size=6, max_steps=5)
    accumulated = make(OURS, tmp_path, llama(), tokens, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=5)
    full.train()
    accumulated.train()
    assert_same_training(full, accumulated)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("accepts", [True, False])
def test_model_accepts_loss_kwargs_can_be_set(accepts, accumulate, tmp_path, capsys):
    trainers = made(tmp_path, llama(), tokens, gradient_accumulation_steps=accumulate, max_steps=4)
    for trainer in trainers:
        assert trainer.model_accepts_loss_kwargs is True
        trainer.model_accepts_loss_kwargs = accepts
        trainer.train()
    assert_same_training(*trainers)


def by_count(outputs, labels, num_items_in_batch=None):
    assert torch.is_tensor(num_items_in_batch) or isinstance(num_items_in_batch, int)
    logits = outputs["logits"]
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch


def by_mean(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, -2), labels.flatten())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("function", [by_count, by_mean])
@pytest.mark.parametrize("name", ["llama", "bert", "plain"])
def test_compute_loss_func(name, function, accumulate, tmp_path, capsys):
    model, data = {"llama": (llama, texts), "bert": (bert, sentences), "plain": (Plain, sentences)}[name]

    def parts(model):
        return {"train_dataset": data(), "compute_loss_func": function}

    assert_same_training(*both(tmp_path, model(), parts, gradient_accumulation_steps=accumulate, max_steps=5))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "name", ["classifier", "causal, unequal token counts", "masked, unequal token counts", "encoder-decoder"]
)
def test_label_smoothing(name, accumulate, tmp_path, capsys):
    model, parts = CASES[name]
    smoothed = both(tmp_path, model(), parts, label_smoothing_factor=0.2, gradient_accumulation_steps=accumulate, max_steps=5)
    assert_same_training(*smoothed)
    plain = make(OURS, tmp_path, model(), parts, gradient_accumulation_steps=accumulate, max_steps=1)
    plain.train()
    assert entries(plain)[0]["loss"] != pytest.approx(entries(smoothed[1])[0]["loss"], rel=1e-4)


def test_label_smoothing_of_several_classes_is_switched_off(tmp_path, capsys):
    model = bert(problem_type="multi_label_classification")
    for side in SIDES:
        with pytest.warns(UserWarning, match="Label smoothing is not compatible with multi-label classification"):
            trainer = make(side, tmp_path, model, examples("several"), label_smoothing_factor=0.2, max_steps=3)
        trainer.train()
        if side is OURS:
            without = make(side, tmp_path, model, examples("several"), max_steps=3)
            without.train()
            assert_same_training(without, trainer)


def test_one_device_averages_the_same_without_average_tokens_across_devices(tmp_path, capsys):
    options = {"gradient_accumulation_steps": 3, "max_steps": 4, "average_tokens_across_devices": False}
    assert_same_training(*both(tmp_path, llama(), tokens, **options))


class SometimesNan(Plain):
    """Its third and fourth losses are not finite, though their gradients are."""

    bad = float("nan")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, input_ids, labels=None):
        outputs = super().forward(input_ids, labels)
        self.calls += 1
        if self.calls in (3, 4):
            outputs["loss"] = outputs["loss"] + self.bad
        return outputs


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(bad, filtered, every, tmp_path, capsys):
    """The weights are those of transformers; logged is the mean of the finite losses, or of all, of each window by itself.

    That is what the argument is documented to do. In transformers 5.24 a bad loss of a window counts as part of a mean, so that a
    window of bad losses alone has loss 0.0; and unfiltered, every metric after the first NaN is NaN.
    """
    model = SometimesNan()
    model.bad = bad
    options = {"logging_nan_inf_filter": filtered, "max_steps": 6}
    theirs, ours = made(tmp_path, model, examples(), logging_steps=every, **options)
    ours.args.nonfinite = "ignore"  # the default is to raise
    for trainer in (theirs, ours):
        trainer.train()
    assert_same_weights(theirs, ours)
    good = make(OURS, tmp_path, SometimesNan(), examples(), logging_steps=1, **options)
    good.model.bad = 0.0
    good.train()
    losses = [bad if step in (2, 3) else entry["loss"] for step, entry in enumerate(entries(good))]
    for entry, start in zip(entries(ours), range(0, 6, every), strict=True):
        window = [loss for loss in losses[start : start + every] if math.isfinite(loss) or not filtered]
        expected = sum(window) / len(window) if window else math.nan
        assert entry["loss"] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    if filtered:
        finite = [loss for loss in losses if math.isfinite(loss)]
        assert ours.state.log_history[-1]["train_loss"] == pytest.approx(sum(finite) / len(finite), rel=1e-5)


def test_a_bad_loss_is_filtered_also_where_a_checkpoint_cuts_the_window(tmp_path, capsys):
    options = {"max_steps": 6, "logging_steps": 6, "nonfinite": "ignore"}
    full = make(OURS, tmp_path, SometimesNan(), examples(), **options)
    accumulated = make(OURS, tmp_path, SometimesNan(), examples(), **options, save_strategy="steps", save_steps=1)
    full.train()
    accumulated.train()
    assert entries(accumulated)[0]["loss"] == pytest.approx(entries(full)[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_of_gpt2_are_divided_by_all_labels(accumulate, tmp_path, capsys):
    """Its class has no `loss_type` in transformers 5.24, which therefore counts also the first label of a row."""
    examples = [row | {"labels": row["input_ids"]} for row in texts()]
    options = {"gradient_accumulation_steps": accumulate, "max_steps": 3}
    theirs, ours = both(tmp_path, gpt2(), lambda model: {"train_dataset": examples}, **options)
    assert_same_training(theirs, ours)


def test_the_model_that_is_given_is_trained(tmp_path, capsys):
    model = bert()
    start = copy.deepcopy(model.state_dict())
    trainer = OURS.kind("Trainer")(
        model,
        OURS.kind("TrainingArguments")(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no"),
        train_dataset=sentences(),
    )
    trainer.train()
    assert trainer.model is model
    assert any(not torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
