"""The metadata of a model card, as huggingface_hub's own parser reads it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from fts.trainer.cards.results import is_number, pretty

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

GENERATED = "generated_from_trainer"
"""The tag by which models that a Trainer made are found on the Hub."""

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
"""What the name of a model's class ends with -> what the model is for, where that is one thing."""

FILES = ("csv", "json", "pandas", "parquet", "text", "arrow", "generator", "imagefolder", "audiofolder", "webdataset")
"""Builders of data sets that say how the rows were stored, not which data set it is."""


@attrs.frozen
class Given:
    """What is said of a model and its data: by the user, or else inferred from the trainer.

    Attributes:
        language: of the model.
        license: its identifier.
        tags: any.
        model_name: for people.
        finetuned_from: the model on the Hub that training began with.
        tasks: identifiers of what it is for.
        dataset_tags: identifiers of data sets on the Hub.
        dataset: their names for people.
        dataset_args: their configurations.
        dataset_split: that was evaluated.
    """

    language: list[str] = attrs.Factory(list)
    license: str | None = None
    tags: list[str] = attrs.Factory(list)
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: list[str] = attrs.Factory(list)
    dataset_tags: list[str] = attrs.Factory(list)
    dataset: list[str] = attrs.Factory(list)
    dataset_args: list[str] = attrs.Factory(list)
    dataset_split: str | None = None


def listed(value: str | Sequence[str] | None) -> list[str]:
    """One or several texts as a list without doubles.

    >>> listed("en"), listed(["en", "de", "en"]), listed(None)
    (['en'], ['en', 'de'], [])
    """
    if value is None:
        return []
    return list(dict.fromkeys([value] if isinstance(value, str) else map(str, value)))


def inferred(trainer: Trainer) -> Given:
    """What the trainer itself tells: the model that training began with, its task and its data."""
    model: Any = trainer.model
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    config = getattr(inner, "config", None)
    origin = getattr(config, "_name_or_path", None) or None
    if not isinstance(origin, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", origin) or Path(origin).exists():
        origin = None
    kind = type(inner).__name__
    tasks = [task for ending, task in TASKS.items() if kind.endswith(ending)]
    tags = [*listed(getattr(model, "model_tags", None)), GENERATED]
    return attrs.evolve(_of_data(trainer), finetuned_from=origin, tasks=tasks, tags=tags)


def _of_data(trainer: Trainer) -> Given:
    dataset = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    builder = getattr(dataset, "builder_name", None)
    if not isinstance(builder, str) or builder in FILES:
        return Given()
    name = getattr(getattr(dataset, "info", None), "dataset_name", None) or builder
    config = getattr(dataset, "config_name", None)
    split = getattr(dataset, "split", None)
    return Given(
        dataset_tags=[name], dataset=[name], dataset_args=listed(config), dataset_split=None if split is None else str(split)
    )


@lru_cache(maxsize=32)
def license_of(model: str) -> str | None:
    """The license of a model on the Hub; None where it has none, or the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        data = HfApi().model_info(model, timeout=10).card_data
        found = None if data is None else data.get("license")
    except Exception as error:  # noqa: BLE001  # a card without a license is as good as one can do
        logger.info("The license of %s could not be looked up: %s", model, type(error).__name__)
        return None
    return found if isinstance(found, str) else None


def metadata(given: Given, results: Mapping[str, Any], library: str | None, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a card, in the Hub's order of names.

    Args:
        given: what is said of the model.
        results: its figures, by name.
        library: that loads it.
        kept: the metadata that the card had before; what is not known anew stays.
    """
    figures = {name: value for name, value in results.items() if name != "loss" and is_number(value)}
    own = {
        "library_name": library,
        "language": given.language,
        "license": given.license,
        "base_model": given.finetuned_from,
        "tags": listed([*given.tags, *listed(kept.get("tags"))]),
        "datasets": given.dataset_tags,
        "metrics": list(figures),
        "model-index": model_index(given, results),
    }
    return {name: value for name, value in (own | {key: kept[key] for key in kept if not own.get(key)}).items() if value}


def model_index(given: Given, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures as the Hub shows them: of each task on each data set. Empty unless both are known."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    figures = {name: value for name, value in results.items() if is_number(value)}
    settings = dict(zip(given.dataset_tags, given.dataset_args, strict=False))
    names = dict(zip(given.dataset_tags, given.dataset, strict=False))
    found = [
        EvalResult(
            task_type=task,
            task_name=pretty(task.replace("-", "_")),
            dataset_type=data,
            dataset_name=names.get(data, data),
            dataset_config=settings.get(data),
            dataset_split=given.dataset_split,
            metric_type=metric,
            metric_name=pretty(metric),
            metric_value=value,
        )
        for task in given.tasks
        for data in given.dataset_tags
        for metric, value in figures.items()
    ]
    return eval_results_to_model_index(given.model_name or "", found) if found else []
