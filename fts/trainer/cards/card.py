"""Model cards: README.md with a description of a run's model, for readers and for the Hub."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from pathlib import Path
from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.messages import DISTRIBUTION
from fts.trainer.cards.fields import CardFields, as_list, infer_fields
from fts.trainer.cards.metadata import license_of, metadata
from fts.trainer.cards.results import evaluation_table, final_results, format_value, markdown_table, pretty_name
from fts.trainer.cards.training_summary import TrainingSummary, hyperparameters

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
DRAFT_MARKER = "<!-- Drafted by fts.Trainer. What you write under the first three headings stays when it is drafted again. -->"
DRAFT_MARKERS = (DRAFT_MARKER, "automatically according to the information the Trainer had access to")
PLACEHOLDER = "More information needed"
USER_SECTIONS = ("Model description", "Intended uses & limitations", "Training and evaluation data")
"""Headings of sections that only the user can write."""

PACKAGES = {"fts": DISTRIBUTION, "PEFT": "peft", "Transformers": "transformers", "Pytorch": "torch", "Datasets": "datasets"}
"""A package's name in the card -> its distribution."""


def write_card(summary: TrainingSummary, given: CardFields) -> None:
    """Write `README.md` in `output_dir`; see `Trainer.create_model_card`.

    An existing card keeps its tags and other metadata. It also keeps its text, unless a Trainer or peft drafted it; then only the
    user's sections stay.

    Args:
        summary: of the run.
        given: what the user says of the model; the rest is inferred.

    Raises:
        ArgumentError: the existing card cannot be read.
    """
    directory = Path(str(summary.args.output_dir))
    previous, text = _read_card(directory / CARD_FILE)
    drafted = _is_drafted(text)
    if drafted:  # then its metrics are those of an earlier run
        previous = {name: value for name, value in previous.items() if name not in ("model-index", "metrics")}
    fields = _complete_fields(given, infer_fields(summary.model, summary.dataset), previous, directory.absolute().name)
    library = _library_of(summary.model)
    state = summary.state
    results = final_results(state.log_history, state.best_global_step if summary.args.load_best_model_at_end else None)
    header = metadata(fields, results, library, previous)
    if drafted:
        text = _draft_text(fields, results, summary, library, _user_sections(text))
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{CARD_FILE}.writing"
    temporary.write_text(f"---\n{_to_yaml(header)}---\n\n{text.strip()}\n", encoding="utf-8")
    temporary.replace(directory / CARD_FILE)  # atomic, since an upload may copy it at the same time


def _complete_fields(given: CardFields, inferred: CardFields, previous: dict[str, Any], default_name: str) -> CardFields:
    dataset_tags = given.dataset_tags or as_list(previous.get("datasets")) or inferred.dataset_tags
    is_inferred = dataset_tags == inferred.dataset_tags
    fields = CardFields(
        language=given.language or as_list(previous.get("language")),
        license=given.license or previous.get("license"),
        tags=[*given.tags, *inferred.tags],
        model_name=given.model_name or default_name,
        finetuned_from=given.finetuned_from or inferred.finetuned_from,
        tasks=given.tasks or inferred.tasks,
        dataset_tags=dataset_tags,
        dataset=given.dataset or (inferred.dataset if is_inferred else dataset_tags),
        dataset_args=given.dataset_args or (inferred.dataset_args if is_inferred else []),
        dataset_split=inferred.dataset_split if is_inferred else None,
    )
    if fields.license is None and fields.finetuned_from is not None:
        return attrs.evolve(fields, license=license_of(fields.finetuned_from))
    return fields


def versions(library: str | None) -> dict[str, str]:
    """The versions of the packages that the model was trained with, by their names in the card.

    Args:
        library: "peft" or "transformers", if the model is from it.
    """
    libraries = {"peft": ("peft", "transformers"), "transformers": ("transformers",)}.get(library or "", ())
    found = {}
    for name, package in PACKAGES.items():
        if package in ("peft", "transformers") and package not in libraries:
            continue
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # it runs from its sources, or is not used
    return found


def _library_of(model: Any) -> str | None:
    if hasattr(model, "peft_config"):
        return "peft"
    return "transformers" if type(model).__module__.startswith("transformers.") or hasattr(model, "push_to_hub") else None


def _read_card(path: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card; empty if it does not exist."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}, ""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
        return dict(card.data.to_dict()), str(card.text)
    except Exception as error:
        problem = " ".join(str(error).split())
        raise ArgumentError(
            f"{path} is not replaced by a new model card, because its metadata cannot be read: {problem}. Fix it or move it away."
        ) from error


def _to_yaml(data: dict[str, Any]) -> str:
    from huggingface_hub.utils import yaml_dump

    return str(yaml_dump(data, sort_keys=False))


def _is_drafted(text: str) -> bool:
    return not text.strip() or any(marker in text for marker in DRAFT_MARKERS) or text.count("[More Information Needed]") > 3


def _user_sections(text: str) -> dict[str, str]:
    if not any(marker in text for marker in DRAFT_MARKERS):
        return {}
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    sections = {name.strip(): body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: body for name, body in sections.items() if name in USER_SECTIONS}


def _draft_text(
    fields: CardFields, results: dict[str, Any], summary: TrainingSummary, library: str | None, sections: dict[str, str]
) -> str:
    base = fields.finetuned_from
    link = "" if base is None else f"[{base}](https://huggingface.co/{base}), fine-tuned"
    data = " and ".join(f"the {name} dataset" for name in fields.dataset)
    lines = [DRAFT_MARKER, "", f"# {fields.model_name}", ""]
    lines += [f"{link or 'A model trained from scratch'} on {data or 'data that the trainer has no name for'}."]
    if results:
        lines += ["", "Results on the evaluation set:", ""]
        lines += [f"- {pretty_name(name)}: {format_value(value)}" for name, value in results.items()]
    for heading in USER_SECTIONS:
        lines += ["", f"## {heading}", "", sections.get(heading) or PLACEHOLDER]
    lines += ["", "## Training procedure", "", "### Training hyperparameters", ""]
    lines += [f"- {name}: {value}" for name, value in hyperparameters(summary).items()]
    rows = evaluation_table(summary.state.log_history)
    if rows:
        lines += ["", "### Training results", "", markdown_table(rows)]
    lines += ["", "### Framework versions", ""]
    lines += [f"- {name} {version}" for name, version in versions(library).items()]
    return "\n".join(lines)
