"""What a model card says of a model and its data: what the user gives, and what the model and the data set know."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import nn

GENERATED_TAG = "generated_from_trainer"
"""The tag by which models from a Trainer are found on the Hub."""

TASKS = {
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MultipleChoice": "multiple-choice",
    "MaskedLM": "fill-mask",
    "CausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ImageClassification": "image-classification",
    "ObjectDetection": "object-detection",
    "SemanticSegmentation": "image-segmentation",
    "UniversalSegmentation": "image-segmentation",
    "AudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
    "SpeechSeq2Seq": "automatic-speech-recognition",
    "ImageTextToText": "image-text-to-text",
}
"""The end of a model class's name -> the model's task, if it has only one."""

FILE_BUILDERS = ("csv", "json", "pandas", "parquet", "text", "arrow", "generator", "imagefolder", "audiofolder", "webdataset")
"""Builders of data sets that say how the examples were stored, not which data set it is."""


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """One or several strings as a list without duplicates.

    >>> as_list("en"), as_list(["en", "de", "en"]), as_list(None)
    (['en'], ['en', 'de'], [])
    """
    if value is None:
        return []
    return list(dict.fromkeys([value] if isinstance(value, str) else map(str, value)))


@attrs.frozen
class CardFields:
    """What a card says of a model and its data; fields with several values accept one string.

    Attributes:
        language: of the model.
        license: its identifier.
        tags: any.
        model_name: the title.
        finetuned_from: the model on the Hub that training started from.
        tasks: identifiers of the model's tasks.
        dataset_tags: identifiers of data sets on the Hub.
        dataset: their titles.
        dataset_args: their configurations.
        dataset_split: the evaluated one.

    >>> CardFields("en").language
    ['en']
    """

    language: list[str] = attrs.field(factory=list, converter=as_list)
    license: str | None = None
    tags: list[str] = attrs.field(factory=list, converter=as_list)
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: list[str] = attrs.field(factory=list, converter=as_list)
    dataset_tags: list[str] = attrs.field(factory=list, converter=as_list)
    dataset: list[str] = attrs.field(factory=list, converter=as_list)
    dataset_args: list[str] = attrs.field(factory=list, converter=as_list)
    dataset_split: str | None = None


def infer_fields(model: nn.Module, dataset: Any) -> CardFields:
    """What the model and the data set know: the model that training started from, its task and its data.

    Args:
        model: any.
        dataset: that was evaluated, or else trained on.
    """
    base: Any = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    config = getattr(inner, "config", None)
    origin = getattr(config, "_name_or_path", None) or None
    if not isinstance(origin, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", origin) or Path(origin).exists():
        origin = None
    class_name = type(inner).__name__
    tasks = [task for suffix, task in TASKS.items() if class_name.endswith(suffix)]
    model_tags: Any = getattr(model, "model_tags", None)
    tags = [*as_list(model_tags), GENERATED_TAG]
    return attrs.evolve(_infer_dataset(dataset), finetuned_from=origin, tasks=tasks, tags=tags)


def _infer_dataset(dataset: Any) -> CardFields:
    builder = getattr(dataset, "builder_name", None)
    if not isinstance(builder, str) or builder in FILE_BUILDERS:
        return CardFields()
    name = getattr(getattr(dataset, "info", None), "dataset_name", None) or builder
    config = getattr(dataset, "config_name", None)
    split = getattr(dataset, "split", None)
    return CardFields(
        dataset_tags=[name], dataset=[name], dataset_args=as_list(config), dataset_split=None if split is None else str(split)
    )
