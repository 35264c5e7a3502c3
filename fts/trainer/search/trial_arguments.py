"""The training arguments of a trial."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments, check_conflicts, unknown_name_error

_SIMILARITY = 0.8  # above it a name is a typo of an argument's; below it model_init may read the value

_SET_EARLY = "It is read when the Trainer is made: set it there."
_NOT_SEARCHABLE = {
    "output_dir": "Each trial has its own folder below it, which hp_name can name.",
    **dict.fromkeys(("label_names", "disable_tqdm", "report_to"), _SET_EARLY),
    **dict.fromkeys(("full_determinism", "tf32", "log_level"), f"It applies to the process. {_SET_EARLY}"),
}


def with_trial_values(args: TrainingArguments, values: Mapping[str, Any], *, for_model: bool) -> TrainingArguments:
    """A copy of arguments with a trial's values; the arguments themselves stay unchanged.

    A fraction for an integer argument is truncated, so that `tune.uniform(1, 40)` may choose a seed.

    Args:
        args: those of the search.
        values: by name.
        for_model: whether `model_init` takes the trial: then it may read names that are unlike any argument's.

    Raises:
        ArgumentError: there is no such argument, or it cannot have that value.

    >>> with_trial_values(TrainingArguments(), {"seed": 3.7}, for_model=False).seed
    3
    >>> with_trial_values(TrainingArguments(), {"learning_rat": 0.1}, for_model=True)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: TrainingArguments has no argument 'learning_rat'. Did you mean 'learning_rate'?
    """
    changed = copy.copy(args)
    types = {name: _type_name(field.type) for name, field in type(args).__dataclass_fields__.items()}
    for name, value in values.items():
        if (name in types or hasattr(args, name)) and name not in _NOT_SEARCHABLE:
            setattr(changed, name, _convert(value, types.get(name, "")))
        elif not for_model or name in _NOT_SEARCHABLE or unknown_name_error(type(args).__name__, name, types, _SIMILARITY):
            raise _unknown_argument(type(args).__name__, name, types, for_model=for_model)
    check_conflicts(changed)
    return changed


def _unknown_argument(owner: str, name: str, types: Mapping[str, str], *, for_model: bool) -> ArgumentError:
    if name in _NOT_SEARCHABLE:
        return ArgumentError(f"A search cannot choose {name!r}. {_NOT_SEARCHABLE[name]}")
    error = unknown_name_error(owner, name, types, _SIMILARITY if for_model else 0.6)
    return error or ArgumentError(
        f"{owner} has no argument {name!r}, and none with a similar name. For a value of the model, let model_init take the "
        "trial."
    )


def _type_name(annotation: Any) -> str:
    """An annotation as text: transformers' HfArgumentParser replaces the texts by classes."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _convert(value: Any, type_name: str) -> Any:
    plain = value.item() if callable(getattr(value, "item", None)) else value  # numpy's numbers
    return int(plain) if isinstance(plain, float) and type_name.split(" ", maxsplit=1)[0] == "int" else plain
