"""Model cards: README.md with what a run knows of its model, for people and for the Hub."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from fts.errors import ArgumentError
from fts.messages import DISTRIBUTION
from fts.trainer.cards.metadata import (CardFields, infer_fields, license_of, as_list, metadata)
from fts.trainer.cards.results import (final_results, markdown_table, pretty_name, format_value, evaluation_table)

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
DRAFT_MARKER = "<!-- Drafted by fts.Trainer. What you write under the first three headings stays when it is drafted again. -->"
DRAFT_MARKERS = (DRAFT_MARKER, "automatically according to the information the Trainer had access to")
PLACEHOLDER = "More information needed"
USER_SECTIONS = ("Model description", "Intended uses & limitations", "Training and evaluation data")
"""Headings of what only people know."""

PACKAGES = {"fts": DISTRIBUTION, "PEFT": "peft", "Transformers": "transformers", "Pytorch": "torch", "Datasets": "datasets"}
"""What people call a package -> its name."""

Texts = str | Sequence[str] | None


def write_card(
    trainer: Trainer,
    language: str | None = None,
    license: str | None = None,
    tags: Texts = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: Texts = None,
    dataset_tags: Texts = None,
    dataset: Texts = None,
    dataset_args: Texts = None,
) -> None:
    """Write `README.md` in `output_dir`; see `Trainer.create_model_card`.

    A card that is there keeps its tags and what else its metadata have. Its text stays too, unless a Trainer or peft drafted it;
    then what was written under the headings for people stays.

    Raises:
        ArgumentError: the card that is there cannot be read.
    """
    directory = Path(str(trainer.args.output_dir))
    kept, text = _read(directory / CARD_FILE)
    told, drafted = infer_fields(trainer), _is_drafted(text)
    if drafted:  # then its figures are those of an earlier run
        kept = {name: value for name, value in kept.items() if name not in ("model-index", "metrics")}
    data_tags = as_list(dataset_tags) or as_list(kept.get("datasets")) or told.dataset_tags
    is_told = data_tags == told.dataset_tags
    given = CardFields(
        language=as_list(language) or as_list(kept.get("language")),
        license=license or kept.get("license"),
        tags=as_list([*as_list(tags), *told.tags]),
        model_name=model_name or directory.absolute().name,
        finetuned_from=finetuned_from or told.finetuned_from,
        tasks=as_list(tasks) or told.tasks,
        dataset_tags=data_tags,
        dataset=as_list(dataset) or (told.dataset if is_told else data_tags),
        dataset_args=as_list(dataset_args) or (told.dataset_args if is_told else []),
        dataset_split=told.dataset_split if is_told else None,
    )
    if given.license is None and given.finetuned_from is not None:
        given = attrs.evolve(given, license=license_of(given.finetuned_from))
    library = _library(trainer.model)
    state = trainer.state
    results = final_results(state.log_history, state.best_global_step if trainer.args.load_best_model_at_end else None)
    head = metadata(given, results, library, kept)
    if drafted:
        text = _draft(given, results, trainer, library, _own_sections(text))
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / f".{CARD_FILE}.writing"
    fresh.write_text(f"---\n{_yaml(head)}---\n\n{text.strip()}\n", encoding="utf-8")
    fresh.replace(directory / CARD_FILE)  # an upload that copies it meanwhile finds the old one or the new one


def hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """The settings that whoever trains the model anew has to know."""
    args: Any = trainer.args
    rows = trainer.get_total_train_batch_size(args)
    found = {
        "learning_rate": args.learning_rate,
        "train_batch_size": trainer._train_batch_size,
        "eval_batch_size": args.eval_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps if args.gradient_accumulation_steps > 1 else None,
        "total_train_batch_size": rows if rows != trainer._train_batch_size else None,
        "num_devices": args.world_size if args.world_size > 1 else None,
        "seed": args.seed,
        "optimizer": _optimizer_of(trainer),
        "weight_decay": args.weight_decay or None,
        "max_grad_norm": args.max_grad_norm,
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_steps": args.warmup_steps or None,
        "training_steps" if args.max_steps > 0 else "num_epochs": args.max_steps if args.max_steps > 0 else args.num_train_epochs,
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
        "label_smoothing_factor": args.label_smoothing_factor or None,
        "neftune_noise_alpha": args.neftune_noise_alpha,
    }
    return {name: getattr(value, "value", value) for name, value in found.items() if value is not None}


def _optimizer_of(trainer: Trainer) -> str:
    args: Any = trainer.args
    given = trainer._given_optimizers[0] or (trainer.optimizer_cls_and_kwargs or (None,))[0]
    if trainer.step is not None:
        return "given as Trainer(step=...)"
    if given is not None:
        return str((given if isinstance(given, type) else type(given)).__name__)
    options = [f"betas {args.adam_beta1}, {args.adam_beta2}", f"epsilon {args.adam_epsilon}"] if "adam" in str(args.optim) else []
    options += [args.optim_args] if args.optim_args else []
    return f"{args.optim} ({'; '.join(options)})" if options else str(args.optim)


def versions(library: str | None) -> dict[str, str]:
    """The packages that the model was made with, by the names that people use.

    Args:
        library: "peft" or "transformers", where the model is of it.
    """
    wanted = {"peft": ("peft", "transformers"), "transformers": ("transformers",)}.get(library or "", ())
    found = {}
    for name, package in PACKAGES.items():
        if package in ("peft", "transformers") and package not in wanted:
            continue
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from its sources, or not used
    return found


def _library(model: Any) -> str | None:
    if hasattr(model, "peft_config"):
        return "peft"
    return "transformers" if type(model).__module__.startswith("transformers.") or hasattr(model, "push_to_hub") else None


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card; empty if it is not there."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}, ""
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
        return dict(card.data.to_dict()), str(card.text)
    except Exception as error:
        told = " ".join(str(error).split())
        raise ArgumentError(
            f"{path} is not replaced by a new model card, because its metadata cannot be read: {told}. Mend it, or move it away."
        ) from error


def _yaml(data: dict[str, Any]) -> str:
    from huggingface_hub.utils import yaml_dump

    return str(yaml_dump(data, sort_keys=False))


def _is_drafted(text: str) -> bool:
    return not text.strip() or any(mark in text for mark in DRAFT_MARKERS) or text.count("[More Information Needed]") > 3


def _own_sections(text: str) -> dict[str, str]:
    if not any(mark in text for mark in DRAFT_MARKERS):
        return {}
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {name.strip(): body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True) if name.strip() in USER_SECTIONS}


def _draft(given: CardFields, results: dict[str, Any], trainer: Trainer, library: str | None, own: dict[str, str]) -> str:
    base = given.finetuned_from
    link = "" if base is None else f"[{base}](https://huggingface.co/{base}), fine-tuned"
    data = " and ".join(f"the {name} dataset" for name in given.dataset)
    lines = [DRAFT_MARKER, "", f"# {given.model_name}", ""]
    lines += [f"{link or 'A model trained from scratch'} on {data or 'data that the trainer has no name for'}."]
    if results:
        lines += ["", "Results on the evaluation set:", ""]
        lines += [f"- {pretty_name(name)}: {format_value(value)}" for name, value in results.items()]
    for heading in USER_SECTIONS:
        lines += ["", f"## {heading}", "", own.get(heading) or PLACEHOLDER]
    lines += ["", "## Training procedure", "", "### Training hyperparameters", ""]
    lines += [f"- {name}: {value}" for name, value in hyperparameters(trainer).items()]
    rows = evaluation_table(trainer.state.log_history)
    if rows:
        lines += ["", "### Training results", "", markdown_table(rows)]
    lines += ["", "### Framework versions", ""]
    lines += [f"- {name} {version}" for name, version in versions(library).items()]
    return "\n".join(lines)
