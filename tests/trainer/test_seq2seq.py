"""Evaluation by generation: the same sequences, labels and losses as transformers' Seq2SeqTrainer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fts.errors import ArgumentError
from fts.trainer import TrainingArguments
from fts.trainer.arguments import Seq2SeqTrainingArguments
from fts.trainer.seq2seq import (
    Seq2SeqTrainer,
    exchanges_parameters,
    generate_batch,
    generation_inputs,
    generation_settings,
    load_generation_config,
    pad_to,
    pad_token_of,
    width_of,
)

transformers = pytest.importorskip("transformers")

PAD, EOS = 0, 1


def t5():
    config = transformers.T5Config(
        vocab_size=30,
        d_model=16,
        d_kv=8,
        num_heads=2,
        d_ff=32,
        num_layers=1,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def learnt() -> dict[str, torch.Tensor]:
    """Weights of a model that has begun to learn, for one with random weights repeats a single token."""
    torch.manual_seed(0)
    model = t5()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = transformers.DataCollatorForSeq2Seq(tokenizer(), model=model)(make_examples(64, seed=3))
    for _ in range(100):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.fixture
def model_of(learnt):
    """Makes equal models."""

    def make():
        model = t5()
        model.load_state_dict(learnt)
        return model

    return make


def make_examples(count: int = 10, *, labelled: bool = True, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        ids = torch.randint(2, 30, (3 + index % 4,), generator=generator).tolist()
        row = {"input_ids": [*ids, EOS], "attention_mask": [1] * (len(ids) + 1)}
        found.append({**row, "labels": [*reversed(ids), EOS]} if labelled else row)
    return found


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {"<pad>": PAD, "</s>": EOS, **{str(index): index for index in range(2, 30)}}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )


def trainers(tmp_path, model_of, *, own=None, **settings):
    """Transformers' trainer and ours, with models, data and arguments of their own that are equal."""
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_eval_batch_size": 4,
        "predict_with_generate": True,
        **settings,
    }
    kinds = (
        (transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments),
        (Seq2SeqTrainer, Seq2SeqTrainingArguments),
    )
    for trainer, arguments in kinds:
        made, given = model_of(), tokenizer()
        named = {
            "data_collator": transformers.DataCollatorForSeq2Seq(given, model=made),
            "processing_class": given,
            "train_dataset": make_examples(16, seed=2),
            "eval_dataset": make_examples(4, seed=1),
            "compute_metrics": lambda prediction: {"tokens": float(np.not_equal(prediction.predictions, PAD).sum())},
        } | (own or {})
        yield trainer(model=made, args=arguments(**settings), **named)


# The same as transformers


SETTINGS = [
    ({"generation_max_length": 6}, {}, None),
    ({"generation_num_beams": 3, "generation_max_length": 7}, {}, None),
    ({"generation_max_length": 6}, {"max_length": 9, "num_beams": 2}, None),
    ({"generation_max_length": 6}, {"max_new_tokens": 3}, None),
    ({"generation_max_length": 8}, {"max_length": None, "num_beams": None, "repetition_penalty": 1.5}, None),
    ({}, {}, {"max_length": 5}),
    ({}, {}, {"max_length": 4, "max_new_tokens": 8}),
    ({}, {}, {"max_new_tokens": 30}),
    ({"generation_max_length": 24}, {}, None),
]


@pytest.mark.parametrize(("settings", "gen_kwargs", "config"), SETTINGS)
def test_predictions_are_those_of_transformers(tmp_path, settings, gen_kwargs, config, model_of):
    """Three batches of different widths; the pad token fills up each, -100 what is between them."""
    outputs = []
    for trainer in trainers(tmp_path, model_of, **settings):
        for name, value in (config or {}).items():
            setattr(trainer.model.generation_config, name, value)
        outputs.append(trainer.predict(make_examples(10), **gen_kwargs))
    theirs, ours = outputs
    assert ours.predictions.tolist() == theirs.predictions.tolist()
    assert ours.label_ids.tolist() == theirs.label_ids.tolist()
    assert len(np.unique(ours.predictions)) > 3
    assert ours.metrics["test_tokens"] == theirs.metrics["test_tokens"]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_evaluation_gives_the_metrics_of_transformers(tmp_path, smoothing, model_of):
    """One batch, so that a mean over tokens (fts) is the mean over batches (transformers)."""
    theirs, ours = (trainer.evaluate(num_beams=2) for trainer in trainers(tmp_path, model_of, label_smoothing_factor=smoothing))
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)
    assert ours["eval_tokens"] == theirs["eval_tokens"]


def test_training_with_evaluations_gives_the_curve_of_transformers(tmp_path, model_of):
    curves = []
    for trainer in trainers(
        tmp_path,
        model_of,
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        generation_max_length=8,
        per_device_train_batch_size=4,
    ):
        trainer.train()
        shown = ("loss", "eval_loss", "eval_tokens")
        curves.append([entry[name] for entry in trainer.state.log_history for name in shown if name in entry])
    theirs, ours = curves
    assert len(ours) == 6 + 3 * 2
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_without_generation_predictions_are_logits(tmp_path, model_of):
    theirs, ours = (
        trainer.predict(make_examples(4))
        for trainer in trainers(tmp_path, model_of, predict_with_generate=False, own={"compute_metrics": None})
    )
    left, right = (side.predictions[0] if isinstance(side.predictions, tuple) else side.predictions for side in (theirs, ours))
    assert right.shape == left.shape
    np.testing.assert_allclose(right, left, rtol=1e-5, atol=1e-6)
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-6)


def test_every_returned_sequence_is_a_row(tmp_path, model_of):
    own = {"compute_metrics": lambda prediction: {"rows": len(prediction.predictions)}}
    theirs, ours = (
        trainer.predict(make_examples(10), max_length=8, num_beams=3, num_return_sequences=3)
        for trainer in trainers(tmp_path, model_of, own=own)
    )
    assert ours.metrics["test_rows"] == theirs.metrics["test_rows"] == 30
    assert ours.predictions.tolist() == theirs.predictions.tolist()
    assert len(ours.label_ids) == 10


# Where fts differs


def own_trainer(tmp_path, model_of, **changes):
    *_, ours = trainers(tmp_path, model_of, **changes)
    return ours


def test_without_any_length_every_batch_is_generated_alike(tmp_path, model_of):
    """transformers writes its default into the model's config after the first batch, which shortens the others by one token."""
    trainer = own_trainer(tmp_path, model_of)
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(), model=trainer.model)
    found = trainer.predict(make_examples(8)).predictions
    for first in (0, 4):
        batch = generation_inputs(collator(make_examples(8)[first : first + 4]))
        expected = model_of().eval().generate(**batch)
        width = expected.shape[1]
        assert found[first : first + 4, :width].tolist() == expected.tolist()
        assert np.isin(found[first : first + 4, width:], (PAD, -100)).all()


def test_examples_without_labels_are_predicted(tmp_path, model_of):
    """transformers' collator then gives `labels=None`, on which its trainer fails."""
    output = own_trainer(tmp_path, model_of).predict(make_examples(6, labelled=False))
    labelled = own_trainer(tmp_path, model_of).predict(make_examples(6))
    assert output.label_ids is None
    assert "test_loss" not in output.metrics
    assert output.predictions.tolist() == labelled.predictions.tolist()


def test_settings_of_a_call_hold_for_each_of_several_sets_and_end_with_it(tmp_path, model_of):
    trainer = own_trainer(tmp_path, model_of, generation_max_length=9)
    seen = []
    generate = trainer.model.generate
    trainer.model.generate = lambda *args, **kwargs: seen.append(kwargs["max_length"]) or generate(*args, **kwargs)
    trainer.evaluate({"one": make_examples(3), "two": make_examples(3)}, max_length=5)
    trainer.evaluate()
    assert seen == [5, 5, 9]
    assert trainer._gen_kwargs == {}


def test_settings_end_also_where_an_evaluation_fails(tmp_path, model_of):
    def fails(prediction):
        raise RuntimeError("no metric")

    trainer = own_trainer(tmp_path, model_of, own={"compute_metrics": fails})
    with pytest.raises(RuntimeError, match="no metric"):
        trainer.evaluate(max_length=5)
    assert trainer._gen_kwargs == {}


def test_evaluation_leaves_the_generation_config_as_it_was(tmp_path, model_of):
    trainer = own_trainer(tmp_path, model_of, generation_max_length=6)
    before = trainer.model.generation_config.to_dict()
    trainer.evaluate()
    assert trainer.model.generation_config.to_dict() == before


def test_a_step_may_be_given_settings_of_its_own(tmp_path, model_of):
    class Short(Seq2SeqTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, max_length=3)

    model = model_of()
    model.generation_config.max_length = 3
    args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, predict_with_generate=True, disable_tqdm=True)
    trainer = Short(model, args, transformers.DataCollatorForSeq2Seq(tokenizer(), model=model), processing_class=tokenizer())
    assert trainer.predict(make_examples(4, labelled=False), max_length=12).predictions.shape == (4, 3)


def test_losses_alone_are_computed_without_generating(tmp_path, model_of):
    trainer = own_trainer(tmp_path, model_of, prediction_loss_only=True)
    trainer.model.generate = None
    assert np.isfinite(trainer.evaluate()["eval_loss"])


# The generation config


@pytest.mark.parametrize("form", ["object", "directory", "file"])
def test_the_generation_config_of_the_arguments_replaces_the_models(tmp_path, form, model_of):
    given = transformers.GenerationConfig(max_length=7, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD)
    given.save_pretrained(tmp_path)
    source = {"object": given, "directory": str(tmp_path), "file": tmp_path / "generation_config.json"}[form]
    theirs, ours = trainers(tmp_path / "out", model_of, generation_config=source)
    assert ours.model.generation_config is not given
    assert ours.model.generation_config.max_length == 7
    assert ours.predict(make_examples(5)).predictions.tolist() == theirs.predict(make_examples(5)).predictions.tolist()


def test_a_generation_config_that_contradicts_itself_is_refused_early(tmp_path, model_of):
    bad = transformers.GenerationConfig(do_sample=False, top_p=0.9)
    with pytest.raises(ArgumentError, match="Fix these issues to train your model"):
        load_generation_config(bad)
    with pytest.raises(ValueError, match="top_p"):
        own_trainer(tmp_path, model_of, generation_config=bad)


# The functions above the class


def test_generate_batch_equals_generate(model_of):
    model = model_of().eval()
    ids = torch.randint(2, 30, (3, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full((3, 4), 5)}
    expected = model.generate(input_ids=ids, attention_mask=batch["attention_mask"], max_length=6)
    found = generate_batch(model, {**batch, "decoder_input_ids": torch.full((3, 4), 7)}, {"max_length": 6, "num_beams": None})
    assert found.tolist() == expected.tolist()


def test_a_prompt_of_the_decoder_is_continued(model_of):
    model = model_of().eval()
    ids = torch.randint(2, 30, (3, 5))
    prompt = torch.tensor([[PAD, 9]] * 3)
    batch = {"input_ids": ids, "labels": torch.full((3, 4), 5), "decoder_input_ids": prompt}
    assert generation_inputs(batch).keys() == {"input_ids", "decoder_input_ids"}
    assert generate_batch(model, batch, {"max_length": 6})[:, :2].tolist() == prompt.tolist()


def test_settings_of_a_call_win_over_the_arguments():
    args = SimpleNamespace(generation_max_length=9, generation_num_beams=4)
    assert generation_settings(args, {}) == {"max_length": 9, "num_beams": 4}
    assert generation_settings(args, {"max_length": 3, "num_beams": 1}) == {"max_length": 3, "num_beams": 1}
    assert generation_settings(args, {"max_new_tokens": 3, "top_k": 5}) == {"max_new_tokens": 3, "top_k": 5, "num_beams": 4}
    assert generation_settings(args, {"max_length": None})["max_length"] == 9
    none = SimpleNamespace(generation_max_length=None, generation_num_beams=None)
    assert generation_settings(none, {}) == {}


@pytest.mark.parametrize(
    ("max_length", "max_new_tokens", "width", "expected"),
    [
        (None, None, 3, 20),
        (None, None, 25, 25),
        (7, None, 3, 7),
        (7, None, 9, 9),
        (7, 10, 9, 11),
        (7, 10, 12, 12),
        (12, 4, 3, 12),
    ],
)
def test_widths(max_length, max_new_tokens, width, expected):
    config = SimpleNamespace(max_length=max_length, max_new_tokens=max_new_tokens)
    assert width_of(torch.ones(2, width), config) == expected
    assert width_of(torch.ones(2, 3), None) == 20


def test_padding():
    assert pad_to(torch.tensor([[1, 2], [3, 4]]), 3, 9).tolist() == [[1, 2, 9], [3, 4, 9]]
    model = nn.Linear(1, 1)
    assert pad_token_of(SimpleNamespace(pad_token_id=3), model) == 3
    assert pad_token_of(SimpleNamespace(pad_token_id=None, eos_token_id=2), model) == 2
    model.config = SimpleNamespace(pad_token_id=5)
    assert pad_token_of(None, model) == 5
    assert not exchanges_parameters(model)


def test_errors(tmp_path):
    with pytest.raises(ArgumentError, match=r"no token for that. Set model.config.pad_token_id"):
        pad_token_of(None, nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match=r"Set tokenizer.pad_token"):
        pad_token_of(SimpleNamespace(pad_token_id=None, eos_token_id=None), nn.Linear(1, 1))
    with pytest.raises(ArgumentError, match="Linear has none"):
        generate_batch(nn.Linear(1, 1), {})
    with pytest.raises(ArgumentError, match=r"must be fts.Seq2SeqTrainingArguments, not .*TrainingArguments"):
        Seq2SeqTrainer(t5(), TrainingArguments(str(tmp_path)))
