import pickle
import subprocess
import sys

import pytest
import torch

from fts.trainer.data.collator import default_data_collator, get_data_collator
from tests.trainer.sample_data import minilm, tokenized


def test_tokenizers_pad_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    tokenizer = minilm()
    collator = get_data_collator(tokenizer)
    assert type(collator) is transformers.DataCollatorWithPadding
    examples = tokenized(tokenizer).remove_columns(["text", "number"])
    batch = collator([examples[i] for i in (0, 5)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, max(len(examples[i]["input_ids"]) for i in (0, 5)))
    assert batch["labels"].tolist() == [0, 2]


def test_feature_extractors_of_sequences_pad_and_image_processors_do_not():
    transformers = pytest.importorskip("transformers")
    assert type(get_data_collator(transformers.Wav2Vec2FeatureExtractor())) is transformers.DataCollatorWithPadding
    images = (
        transformers.ViTImageProcessorPil if hasattr(transformers, "ViTImageProcessorPil") else transformers.ViTImageProcessor
    )
    assert get_data_collator(images()) is default_data_collator


class OwnTokenizer:
    """Pads, and is not of transformers."""

    def pad(self, features, padding, return_tensors):
        longest = max(len(row["input_ids"]) for row in features)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in features]
        return {"input_ids": torch.tensor(ids), "label": torch.tensor([row["label"] for row in features])}


def test_a_tokenizer_of_ones_own_pads():
    collator = pickle.loads(pickle.dumps(get_data_collator(OwnTokenizer())))  # noqa: S301 - as workers receive it
    batch = collator([{"input_ids": [1], "label": 1}, {"input_ids": [1, 2], "label": 0}])
    assert {name: value.tolist() for name, value in batch.items()} == {"input_ids": [[1, 0], [1, 2]], "labels": [1, 0]}


def test_nothing_pads_without_a_processing_class():
    assert get_data_collator(None) is default_data_collator
    assert get_data_collator(object()) is default_data_collator


def test_no_collator_of_ours_needs_transformers():
    script = """
import sys
sys.modules["transformers"] = None
import torch
from fts.trainer.data.collator import get_data_collator
class Pads:
    def pad(self, features, padding, return_tensors):
        return {"x": torch.tensor([row["x"] for row in features])}
assert get_data_collator(Pads())([{"x": 1}])["x"].tolist() == [1]
assert get_data_collator(None)([{"x": 1, "label": 2}])["labels"].tolist() == [2]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
