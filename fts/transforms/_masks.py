"""Which parameters a transform is for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from fts.errors import ArgumentError, UnknownParameterError
from fts.typing import Params

Predicate: TypeAlias = Callable[[str, Tensor], bool]
Mask: TypeAlias = Predicate | Mapping[str, bool] | Collection[str]
"""A predicate on name and tensor, a dictionary name -> bool, or the names."""


def as_predicate(mask: Any, function: str) -> tuple[Predicate, Callable[[Params], None]]:
    """The mask as a predicate, and a check of its names against the parameters."""
    if isinstance(mask, Mapping):
        chosen = {name: bool(value) for name, value in mask.items()}
        return lambda name, tensor: chosen[name], lambda params: check_same_names(function, chosen, params)
    if callable(mask):
        return mask, lambda params: None
    if isinstance(mask, str) or not isinstance(mask, Collection):
        raise ArgumentError(
            f"{function}: a mask is a predicate (name, tensor) -> bool, a dictionary name -> bool, or a collection of "
            f"names, not {mask!r}."
        )
    names = frozenset(mask)
    return lambda name, tensor: name in names, lambda params: check_known_names(function, names, params)


def check_known_names(function: str, names: Collection[Any], params: Params) -> None:
    """Raise unless every name is that of a parameter."""
    unknown = [name for name in names if name not in params]
    if unknown:
        raise UnknownParameterError(f"{function}: there is no parameter {_some(unknown)} here; the names are {_some(params)}.")


def check_same_names(function: str, names: Collection[Any], params: Params) -> None:
    """Raise unless the names are exactly those of the parameters."""
    check_known_names(function, names, params)
    missing = [name for name in params if name not in names]
    if missing:
        raise UnknownParameterError(f"{function}: the dictionary has no entry for {_some(missing)}; every parameter needs one.")


def format_mask(mask: Any) -> str:
    """The mask as it stands in a label."""
    if isinstance(mask, Mapping):
        mask = [name for name, value in mask.items() if value]
    elif callable(mask):
        return getattr(mask, "__name__", type(mask).__name__)
    return _some(mask)


def _some(names: Collection[Any]) -> str:
    listed = [f"{name!r}" for name in sorted(names, key=str)]
    return ", ".join(listed) if len(listed) <= 5 else f"{', '.join(listed[:4])} and {len(listed) - 4} more"


def everything(name: str, tensor: Tensor) -> bool:
    """The mask that selects all parameters."""
    return True
