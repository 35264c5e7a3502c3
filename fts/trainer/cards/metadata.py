"""The metadata of a model card, in the format of huggingface_hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fts.trainer.cards.fields import CardFields, as_list
from fts.trainer.cards.results import is_number, pretty_name

logger = logging.getLogger(__name__)


@lru_cache(maxsize=32)
def license_of(model: str) -> str | None:
    """The license of a model on the Hub; None if it has none, or the Hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        data = HfApi().model_info(model, timeout=10).card_data
        found = None if data is None else data.get("license")
    except Exception as error:  # noqa: BLE001  # the card is then written without a license
        logger.info("The license of %s could not be looked up: %s", model, type(error).__name__)
        return None
    return found if isinstance(found, str) else None


def metadata(fields: CardFields, results: Mapping[str, Any], library: str | None, previous: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a card, in the Hub's order of names.

    Args:
        fields: of the card.
        results: the model's metrics by name.
        library: that loads the model.
        previous: the metadata that the card had before, kept where there is no new value.
    """
    metrics = {name: value for name, value in results.items() if name != "loss" and is_number(value)}
    own = {
        "library_name": library,
        "language": fields.language,
        "license": fields.license,
        "base_model": fields.finetuned_from,
        "tags": as_list([*fields.tags, *as_list(previous.get("tags"))]),
        "datasets": fields.dataset_tags,
        "metrics": list(metrics),
        "model-index": model_index(fields, results),
    }
    merged = own | {key: previous[key] for key in previous if not own.get(key)}
    return {name: value for name, value in merged.items() if value}


def model_index(fields: CardFields, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics in the Hub's format: for each task on each data set. Empty unless both are known."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    metrics = {name: value for name, value in results.items() if is_number(value)}
    configs = dict(zip(fields.dataset_tags, fields.dataset_args, strict=False))
    titles = dict(zip(fields.dataset_tags, fields.dataset, strict=False))
    entries = [
        EvalResult(
            task_type=task,
            task_name=pretty_name(task.replace("-", "_")),
            dataset_type=dataset,
            dataset_name=titles.get(dataset, dataset),
            dataset_config=configs.get(dataset),
            dataset_split=fields.dataset_split,
            metric_type=metric,
            metric_name=pretty_name(metric),
            metric_value=value,
        )
        for task in fields.tasks
        for dataset in fields.dataset_tags
        for metric, value in metrics.items()
    ]
    return eval_results_to_model_index(fields.model_name or "", entries) if entries else []
