"""What happens when an argument gets a value: in the constructor, and whenever one is assigned later."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from fts.trainer.arguments.conflicts import check_conflicts
from fts.trainer.arguments.defaults import (ALIASES, derive_defaults, mark_explicit)
from fts.trainer.arguments.argument_names import check_attribute_name
from fts.trainer.arguments.requirements import check_requirement, check_requirements
from fts.trainer.arguments.strategy import check_strategy
from fts.trainer.arguments.tf32 import apply_tf32
from fts.trainer.arguments.unsupported import check_supported
from fts.trainer.arguments.validators import (VALIDATORS, parse_dict)

if TYPE_CHECKING:
    from fts.trainer.arguments.training_arguments import TrainingArguments


def set_argument(args: TrainingArguments, name: str, value: Any) -> None:
    """Set an attribute of the arguments, if its name and value can work.

    While the arguments are being made, only the value itself is checked; contradictions come when all are there.
    """
    if name.startswith("_"):
        object.__setattr__(args, name, value)
        return
    if name not in type(args).__dataclass_fields__:
        check_attribute_name(type(args), name)
        object.__setattr__(args, name, value)
        return
    value = _parse_custom_dict(args, name, validate_value(name, value))
    settled = is_finalized(args)
    if settled:
        check_requirement(args, name, value)
    object.__setattr__(args, name, value)
    if settled:
        _update_derived(args, name, value)


def validate_value(name: str, value: Any) -> Any:
    """The value to keep for an argument.

    Raises:
        ArgumentError: it cannot work, or turns on what fts does not have yet.
    """
    check = VALIDATORS.get(name)
    kept = value if check is None else check(name, value)
    check_supported(name, kept, given=value)
    return kept


def _parse_custom_dict(args: TrainingArguments, name: str, value: Any) -> Any:
    """The value; a dictionary where a subclass lists the name among those that may be JSON text."""
    text = isinstance(value, str) and value.lstrip().startswith("{")
    return parse_dict(name, value) if text and name in type(args)._VALID_DICT_FIELDS else value


def _update_derived(args: TrainingArguments, name: str, value: Any) -> None:
    if name in ALIASES:
        object.__setattr__(args, ALIASES[name], value)
    mark_explicit(args, name, value)
    derive_defaults(args)
    apply_tf32(args)


def is_finalized(args: TrainingArguments) -> bool:
    """Whether the arguments are complete: filled in and checked."""
    return "_settled" in args.__dict__


def finalize(args: TrainingArguments) -> None:
    """Fill in what was not given, and check that all of it can work here and together."""
    derive_defaults(args)
    check_conflicts(args)
    check_requirements(args)
    check_strategy(args)
    apply_tf32(args)
    object.__setattr__(args, "_settled", True)


def finalize_after(post_init: Callable[..., None]) -> Callable[..., None]:
    """A subclass's `__post_init__`, after which the arguments are settled also where it forgets `super().__post_init__()`."""

    @wraps(post_init)
    def whole(self: TrainingArguments, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        if is_finalized(self):
            check_conflicts(self)  # it may have changed arguments after the base class looked
        else:
            finalize(self)

    return whole
