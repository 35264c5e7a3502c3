"""Which columns of a dataset the model's forward takes, and the removal of unused ones."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from fts.errors import DataError
from fts.trainer.data.collator import Collator

logger = logging.getLogger(__name__)


def signature_columns(model: nn.Module, label_names: Sequence[str]) -> tuple[str, ...] | None:
    """The names that a model's forward takes, and those that may become labels.

    Returns:
        The names, or None if forward takes any.

    >>> signature_columns(nn.Linear(1, 1), ["labels"])
    ('input', 'label', 'label_ids', 'labels')
    """
    parameters = _parameters(model)
    names = forward_arguments(model)
    if not names and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(dict.fromkeys([*names, "label", "label_ids", *label_names]))


def find_labels(model: nn.Module) -> list[str]:
    """The arguments of a model's forward that are labels, by their names.

    >>> class Net(nn.Module):
    ...     def forward(self, x, labels=None): ...
    >>> find_labels(Net())
    ['labels']
    """
    answers = ("start_positions", "end_positions") if "QuestionAnswering" in type(unwrap_model(model)).__name__ else ()
    return [p.name for p in _parameters(model) if "label" in p.name or p.name in answers]


def forward_arguments(model: nn.Module) -> list[str]:
    """The names of the arguments that a model's forward takes.

    >>> forward_arguments(nn.Linear(1, 1))
    ['input']
    """
    return [p.name for p in _parameters(model) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def required_arguments(model: nn.Module) -> list[str]:
    """The names of the arguments that a model's forward requires.

    >>> class Net(nn.Module):
    ...     def forward(self, x, labels=None): ...
    >>> required_arguments(Net())
    ['x']
    """
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in _parameters(model) if p.kind in named and p.default is p.empty]


def can_return_loss(model: nn.Module) -> bool:
    """Whether a model's forward returns a loss without labels: it has an argument `return_loss` that is True by default.

    >>> can_return_loss(nn.Linear(1, 1))
    False
    """
    return any(p.name == "return_loss" and p.default is True for p in _parameters(model))


def unexpected_keys(model: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """The keys of a batch that a model's forward does not take.

    >>> unexpected_keys(nn.Linear(1, 1), {"input": 1, "text": "a"})
    ['text']
    """
    parameters = _parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    names = {p.name for p in parameters}
    return [str(key) for key in batch if key not in names]


def remove_unused_columns(dataset: Any, collator: Collator, accepted: Sequence[str] | None, what: str) -> tuple[Any, Collator]:
    """Drop the columns that a model cannot use: from the dataset where it has columns, else in front of the collator.

    Args:
        dataset: any dataset.
        collator: makes a batch of examples.
        accepted: the names to keep; None keeps all.
        what: "training" or "evaluation", for messages.

    Raises:
        DataError: no column is left.
    """
    if accepted is None:
        return dataset, collator
    columns = getattr(dataset, "column_names", None)
    remove: Callable[[list[str]], Any] | None = getattr(dataset, "remove_columns", None)
    if not isinstance(columns, list) or remove is None or _has_transform(dataset):
        return dataset, RemoveColumnsCollator(collator, frozenset(accepted), what)
    unused = [name for name in columns if name not in accepted]
    if len(unused) == len(columns):
        raise _no_columns_error(what, columns, accepted)
    if unused:
        logger.info("The %s set's columns %s are no arguments of the model's forward and were dropped.", what, ", ".join(unused))
    return remove(unused) if unused else dataset, collator


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch and peft, whose own forward takes anything.

    >>> type(unwrap_model(nn.DataParallel(nn.Linear(1, 1)))).__name__
    'Linear'
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap_model(model.module)
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return unwrap_model(compiled)
    base: Any = getattr(model, "get_base_model", None)
    if callable(base):
        return unwrap_model(base())
    if type(model).__name__ == "PeftMixedModel":  # the one that has no get_base_model
        mixed: Any = model
        return unwrap_model(mixed.base_model.model)
    return model


def _has_transform(dataset: Any) -> bool:
    # a function set by `set_transform` makes the columns of an example; the columns of the table are its inputs
    form = getattr(dataset, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(unwrap_model(model).forward).parameters.values())


@attrs.frozen
class RemoveColumnsCollator:
    """A collator that sees only accepted keys. A class, not a closure, so that workers can receive it."""

    collator: Collator
    accepted: frozenset[str]
    what: str

    def __call__(self, examples: Any) -> Any:
        if isinstance(examples, Mapping):  # a dataset's __getitems__ may return a batch
            return self.collator(self._kept(examples))
        if not isinstance(examples[0], Mapping) or self.accepted.issuperset(examples[0]):
            return self.collator(examples)
        return self.collator([self._kept(example) for example in examples])

    def _kept(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.accepted.issuperset(example):
            return example
        kept = {name: value for name, value in example.items() if name in self.accepted}
        if not kept:
            raise _no_columns_error(self.what, list(example), sorted(self.accepted))
        return kept


def _no_columns_error(what: str, columns: Sequence[str], accepted: Sequence[str]) -> DataError:
    return DataError(
        f"The model's forward takes none of the {what} set's columns: they are {', '.join(map(str, columns))}; it takes "
        f"{', '.join(accepted)}. Rename columns, tokenize the text first, or set remove_unused_columns=False and pass a "
        "data_collator."
    )
