"""Where a search looks, and what a trial's values make of the arguments."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments, check_contradictions
from fts.trainer.arguments.names import unknown_name

_NEAR = 0.8  # as for attributes: what model_init reads has a name of its own, but no typing error's

_AT_FIRST = "It is read when the Trainer is made: set it there."
_FIXED = {
    "output_dir": "Each trial has a folder of its own below it, which hp_name can name.",
    **dict.fromkeys(("label_names", "disable_tqdm", "report_to"), _AT_FIRST),
    **dict.fromkeys(("full_determinism", "tf32", "log_level"), f"It holds for the whole process. {_AT_FIRST}"),
}


def default_hp_space_optuna(trial: Any) -> dict[str, Any]:
    """Learning rate, epochs, seed and batch size, as the reference searches them with optuna.

    Args:
        trial: an `optuna.Trial`.
    """
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 5),
        "seed": trial.suggest_int("seed", 1, 40),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [4, 8, 16, 32, 64]),
    }


def default_hp_space_ray(trial: Any = None) -> dict[str, Any]:
    """Learning rate, epochs, seed and batch size, as the reference searches them with Ray Tune.

    Args:
        trial: is not used; there is none yet when Ray asks for its space.
    """
    from ray import tune

    return {
        "learning_rate": tune.loguniform(1e-6, 1e-4),
        "num_train_epochs": tune.choice(list(range(1, 6))),
        "seed": tune.uniform(1, 40),
        "per_device_train_batch_size": tune.choice([4, 8, 16, 32, 64]),
    }


def arguments_with(args: TrainingArguments, values: Mapping[str, Any], *, for_model: bool) -> TrainingArguments:
    """A copy of arguments with a trial's values; the arguments themselves stay as they are.

    A fraction for an argument that is a whole number is cut, so that `tune.uniform(1, 40)` may choose a seed.

    Args:
        args: those of the search.
        values: by name.
        for_model: whether `model_init` takes the trial, so that names which no argument has, nor one like it, are for it.

    Raises:
        ArgumentError: there is no such argument, or it cannot have that value.

    >>> arguments_with(TrainingArguments(), {"seed": 3.7}, for_model=False).seed
    3
    >>> arguments_with(TrainingArguments(), {"learning_rat": 0.1}, for_model=True)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: TrainingArguments has no argument 'learning_rat'. Did you mean 'learning_rate'?
    """
    changed = copy.copy(args)
    kinds = {name: _kind(field.type) for name, field in type(args).__dataclass_fields__.items()}
    for name, value in values.items():
        if (name in kinds or hasattr(args, name)) and name not in _FIXED:
            setattr(changed, name, _fitted(value, kinds.get(name, "")))
        elif not for_model or name in _FIXED or unknown_name(type(args).__name__, name, kinds, _NEAR):
            raise _unknown(type(args).__name__, name, kinds, for_model=for_model)
    check_contradictions(changed)
    return changed


def _unknown(owner: str, name: str, kinds: Mapping[str, str], *, for_model: bool) -> ArgumentError:
    if name in _FIXED:
        return ArgumentError(f"A search cannot choose {name!r}. {_FIXED[name]}")
    error = unknown_name(owner, name, kinds, _NEAR if for_model else 0.6)
    return error or ArgumentError(
        f"{owner} has no argument {name!r}, and none with a name like it. For a value of the model, let model_init take the "
        "trial."
    )


def _kind(annotation: Any) -> str:
    """An annotation in words: transformers' HfArgumentParser puts classes in the place of texts."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _fitted(value: Any, kind: str) -> Any:
    plain = value.item() if callable(getattr(value, "item", None)) else value  # numpy's numbers
    return int(plain) if isinstance(plain, float) and kind.split(" ", maxsplit=1)[0] == "int" else plain
