"""Checks on the first examples of a data set, before a run begins: whether the model can use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from fts.errors import DataError, FtsError
from fts.loops import Source
from fts.loops.loader_options import unwrap_dataloader
from fts.loops.sampling import EpochSampler, IsolatedGenerators
from fts.loops.shards import unwrap_batch
from fts.steps.losses import shifts_labels
from fts.trainer.data.collator import Collator, default_data_collator
from fts.trainer.data.columns import forward_arguments, required_arguments, unexpected_keys, unwrap_model
from fts.trainer.data.sampler import is_map_style
from fts.typing import Batch

MAX_EXAMPLES = 8
"""How many examples are read, at most."""

CLASSIFICATION_LOSSES = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
)
LABEL_COLUMNS = ("label", "labels", "label_ids")
TOKEN_LOSSES = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration")


class LossInputs(Protocol):
    """What these checks need to know of the loss, such as `fts.trainer.model.LossConfig`."""

    @property
    def label_names(self) -> Sequence[str]:
        """The batch's keys that are labels."""

    @property
    def compute_loss_func(self) -> Callable[..., Any] | None:
        """The user's loss function; None where the model computes its own loss."""


def check_dataloader(loader: Any, model: nn.Module, loss: LossInputs | None, what: str, *, labelled: bool = True) -> None:
    """Collate the first examples of a loader, and raise where the model could not use the batch.

    Nothing happens where that would consume data (an iterable dataset, a loader with its own `__iter__`), or where the sampler
    is not a usual one: see `check_first_batch`.

    Args:
        loader: any loader.
        model: is called with the batch.
        loss: how the loss of the batch is computed; None where a user's method does, so that only the examples are read.
        what: "training" or "evaluation", for messages.
        labelled: whether there must be labels.

    Raises:
        DataError: the model cannot use the batch; it says why.
    """
    plain = unwrap_dataloader(loader)
    if plain is not None and _samples_by_index(plain):
        size = plain.batch_size or 1
        check_examples(plain.dataset, plain.collate_fn, model, loss, what, batch_size=size, labelled=labelled)


def _samples_by_index(loader: DataLoader[Any]) -> bool:
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        return False
    return isinstance(loader.sampler, (SequentialSampler, RandomSampler, EpochSampler))


def check_examples(
    dataset: Any,
    collator: Collator,
    model: nn.Module,
    loss: LossInputs | None,
    what: str,
    *,
    batch_size: int = 1,
    labelled: bool = True,
) -> None:
    """Collate the first examples of a data set, and raise where the model could not use the batch.

    The run's random generators are not used. Where all labels can be read cheaply (one integer for each example of a list or of
    a table of `datasets`), all are checked.

    Args:
        dataset: is not read unless it is map-style.
        collator: makes a batch.
        model: is called with the batch.
        loss: how the loss of the batch is computed; None where a user's method does.
        what: "training" or "evaluation", for messages.
        batch_size: of the run; at most `MAX_EXAMPLES` are read.
        labelled: whether there must be labels.

    Raises:
        DataError: the examples cannot be collated, or the model cannot use the batch.
    """
    if not is_map_style(dataset) or not len(dataset):
        return
    indices = list(range(min(batch_size, MAX_EXAMPLES, len(dataset))))
    get_items = getattr(dataset, "__getitems__", None)
    with IsolatedGenerators(0):
        examples = get_items(indices) if callable(get_items) else [dataset[index] for index in indices]
        batch = _collate(examples, collator, what)
    check_batch(batch, model, loss, what, labelled=labelled)
    if labelled and loss is not None and loss.compute_loss_func is None and _keeps_labels(collator):
        _check_all_labels(dataset, model, what)


def _keeps_labels(collator: Any) -> bool:
    """Whether a collator leaves labels as they are in the data, as far as is known."""
    inner = getattr(collator, "collator", collator)  # inside RemoveColumnsCollator
    kind = f"{type(inner).__module__}.{type(inner).__name__}"
    return inner is default_data_collator or kind == "transformers.data.data_collator.DataCollatorWithPadding"


def _check_all_labels(dataset: Any, model: nn.Module, what: str) -> None:
    """Look for classes that a model does not have in all examples, where the labels alone can be read cheaply."""
    inner = unwrap_model(model)
    config = getattr(inner, "config", None)
    count = getattr(config, "num_labels", None)
    if not isinstance(count, int) or _loss_type(inner) not in CLASSIFICATION_LOSSES:
        return
    labels = _label_column(dataset)
    if labels is not None:
        _check_classes(labels, inner, count, getattr(config, "problem_type", None), what)


def _label_column(dataset: Any) -> Tensor | None:
    """One integer for each example of a list of dictionaries or a table of `datasets`; None where it is something else."""
    if isinstance(dataset, list):
        names = [name for name in LABEL_COLUMNS if name in dataset[0]] if isinstance(dataset[0], Mapping) else []
        values = [row.get(names[0]) for row in dataset] if names and all(isinstance(row, Mapping) for row in dataset) else []
        return torch.tensor(values) if values and all(type(value) is int for value in values) else None
    names = [name for name in LABEL_COLUMNS if name in (getattr(dataset, "column_names", None) or ())]
    if not names or not hasattr(dataset, "select_columns") or dataset.format["type"] == "custom":
        return None
    column = dataset.select_columns(names[:1]).with_format("arrow")[:].column(names[0])
    if not str(column.type).startswith("int") or column.null_count:
        return None
    return torch.tensor(column.to_numpy(), dtype=torch.int64)


def _collate(examples: Any, collator: Collator, what: str) -> Any:
    try:
        return collator(examples)
    except FtsError:
        raise
    except Exception as error:
        name = getattr(collator, "__name__", type(collator).__name__)
        shown = f"the columns {', '.join(map(str, examples[0]))}" if _are_mappings(examples) else "examples of this kind"
        raise DataError(
            f"The data_collator ({name}) cannot make a batch of the first examples of the {what} set, which have {shown}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _are_mappings(examples: Any) -> bool:
    return isinstance(examples, list) and bool(examples) and isinstance(examples[0], Mapping)


def check_first_batch(source: Source, check: Callable[[Batch], None]) -> Source:
    """The same source, whose first batch is checked when it is read.

    Args:
        source: any source.
        check: raises if the batch cannot be used; called once.
    """
    pending = [check]

    def batches(epoch: int, start: int, **options: Any) -> Iterator[Batch]:
        found = source.batches(epoch, start, **options)
        return _check_first(found, pending.pop()) if pending else found

    return attrs.evolve(source, batches=batches)


def _check_first(batches: Iterator[Batch], check: Callable[[Batch], None]) -> Iterator[Batch]:
    for batch in batches:
        check(unwrap_batch(batch))
        yield batch
        break
    yield from batches


def check_batch(batch: Any, model: nn.Module, loss: LossInputs | None, what: str, *, labelled: bool = True) -> None:
    """Raise where a model could not use a batch.

    Args:
        batch: what the collator made.
        model: is called as `model(**batch)`.
        loss: how the loss of the batch is computed; None where a user's method does, which may use a batch in any way.
        what: "training" or "evaluation", for messages.
        labelled: whether there must be labels.

    Raises:
        DataError: the batch is no dictionary, has keys that forward does not take, lacks some that it needs, has none of the
            labels, or has ids or labels outside of the model's tables.

    >>> from types import SimpleNamespace
    >>> loss = SimpleNamespace(label_names=(), compute_loss_func=None)
    >>> check_batch({"input": torch.zeros(1, 2), "text": "?"}, nn.Linear(2, 1), loss, "training")
    Traceback (most recent call last):
        ...
    fts.errors.DataError: Linear.forward does not take text, which a batch of the training set has. Remove these columns, ...
    """
    if loss is None:
        return
    if not isinstance(batch, Mapping):
        raise DataError(
            f"The data_collator made a {type(batch).__name__} of the {what} set; the Trainer calls model(**batch), so it must "
            "make a dictionary."
        )
    _check_keys(batch, model, loss, what)
    if labelled:
        _check_has_labels(batch, model, loss, what)
    _check_ids(batch, model, what)
    if loss.compute_loss_func is None:
        _check_labels(batch, model, loss.label_names, what)


def _check_keys(batch: Mapping[str, Any], model: nn.Module, loss: LossInputs, what: str) -> None:
    name = type(unwrap_model(model)).__name__
    unknown = [key for key in unexpected_keys(model, batch) if loss.compute_loss_func is None or key not in loss.label_names]
    if unknown:
        raise DataError(
            f"{name}.forward does not take {', '.join(unknown)}, which a batch of the {what} set has. Remove "
            "these columns, rename them, or set remove_unused_columns=True."
        )
    hint = (
        "Rename your columns to what forward calls them, or tokenize the text first: remove_unused_columns=True drops the "
        "columns that forward does not name."
    )
    missing = [key for key in required_arguments(model) if key not in batch and key not in loss.label_names]
    if missing:
        raise DataError(
            f"{name}.forward needs {', '.join(missing)}, which a batch of the {what} set lacks: it has "
            f"{', '.join(map(str, batch)) or 'nothing'}. {hint}"
        )
    inputs = [key for key in forward_arguments(model) if key not in loss.label_names]
    if inputs and all(key in loss.label_names for key in batch):
        found = f"nothing but labels ({', '.join(map(str, batch))})" if batch else "nothing"
        raise DataError(
            f"A batch of the {what} set has {found}, and none of the inputs of {name}.forward ({', '.join(inputs[:4])} ...). "
            f"{hint}"
        )


def _check_has_labels(batch: Mapping[str, Any], model: nn.Module, loss: LossInputs, what: str) -> None:
    if loss.compute_loss_func is None and loss.label_names and not any(batch.get(name) is not None for name in loss.label_names):
        raise DataError(
            f"The {what} set has no labels: a batch has {', '.join(map(str, batch))}, the model's labels are called "
            f"{', '.join(loss.label_names)}. Add that column, name yours by label_names=[...], or pass compute_loss_func=."
        )


def _check_ids(batch: Mapping[str, Any], model: nn.Module, what: str) -> None:
    ids = batch.get("input_ids")
    size = _table_size(model, "get_input_embeddings", "num_embeddings")
    if not isinstance(ids, Tensor) or size is None:
        return
    if ids.is_floating_point():
        raise DataError(
            f"input_ids of the {what} set are {ids.dtype}; ids of tokens must be integers (int64). Take the tokenizer's "
            "input_ids as they are, or pass vectors as inputs_embeds."
        )
    # models of several kinds of input may replace ids of their own before they look them up
    if not ids.numel() or any(key.startswith(("pixel_", "image_", "input_features", "audio_")) for key in batch):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise DataError(
            f"input_ids of the {what} set reach from {low} to {high}, but {type(unwrap_model(model)).__name__} has embeddings "
            f"for 0 to {size - 1}. Use the model's own tokenizer, or after adding tokens call model.resize_token_embeddings("
            "len(tokenizer))."
        )


def _check_labels(batch: Mapping[str, Any], model: nn.Module, names: Sequence[str], what: str) -> None:
    inner = unwrap_model(model)
    labels, config = batch.get("labels"), getattr(inner, "config", None)
    if "labels" not in names or not isinstance(labels, Tensor):
        return
    kind = _loss_type(inner)
    count = getattr(config, "num_labels", None)
    if kind in CLASSIFICATION_LOSSES and isinstance(count, int):
        _check_classes(labels, inner, count, getattr(config, "problem_type", None), what)
    elif kind == "ForTokenClassification" and isinstance(count, int):
        _check_label_values(labels, inner, count, _class_range(count), what)
    elif kind in TOKEN_LOSSES:
        size = _table_size(inner, "get_output_embeddings", "out_features")
        labels = labels[..., 1:] if shifts_labels(inner) else labels
        if size is not None:
            _check_label_values(labels, inner, size, f"its vocabulary has {size} tokens. Use the model's own tokenizer", what)


def _loss_type(model: nn.Module) -> str:
    """Which of transformers' losses a model computes; empty for other models, which may use labels in any way."""
    if not type(model).__module__.startswith("transformers."):
        return ""
    return getattr(model, "loss_type", None) or ("ForCausalLM" if type(model).__name__.endswith("LMHeadModel") else "")


def _check_classes(labels: Tensor, model: nn.Module, count: int, problem: str | None, what: str) -> None:
    name = type(model).__name__
    if problem is None and count > 1 and labels.is_floating_point() and labels.ndim < 2:
        raise DataError(
            f"labels of the {what} set are {labels.dtype} with one number per example, and {name} has {count} classes "
            "(num_labels). Give integers for one class each, num_labels=1 for a regression, "
            "or vectors of 0.0 and 1.0 for several classes."
        )
    if problem is None:
        problem = "regression" if count == 1 else "multi" if labels.is_floating_point() else "single_label_classification"
    if problem == "single_label_classification":
        _check_label_values(labels, model, count, _class_range(count), what)
    elif problem == "multi_label_classification" and not labels.is_floating_point():
        raise DataError(
            f"labels of the {what} set are {labels.dtype}, and {name} predicts several labels "
            "(problem_type='multi_label_classification'). Give a vector of 0.0 and 1.0 for each example, as floats."
        )


def _class_range(count: int) -> str:
    return f"it has {count} classes, 0 to {count - 1}. Set num_labels when the model is made, or number the labels from 0"


def _check_label_values(labels: Tensor, model: nn.Module, count: int, limit: str, what: str) -> None:
    name = type(model).__name__
    if labels.dtype not in (torch.int64, torch.uint8):
        raise DataError(
            f"labels of the {what} set are {labels.dtype}; {name} predicts one of {count}, so they must be integers (int64)."
        )
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= count))]
    if wrong.numel():
        raise DataError(
            f"The {what} set has the label {int(wrong.flatten()[0])}, which {name} cannot have: {limit}. "
            "-100 marks a label that is ignored."
        )


def _table_size(model: nn.Module, getter: str, attribute: str) -> int | None:
    """The size of a table of the model, if it is of the usual kind."""
    find = getattr(unwrap_model(model), getter, None)
    try:
        table = find() if callable(find) else None
    except (NotImplementedError, AttributeError):  # some models have no such table
        return None
    size = getattr(table, attribute, None)
    return size if isinstance(size, int) else None
