"""What happens when an argument gets a value: in the constructor, and whenever one is assigned later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field
from functools import wraps
from typing import Any, ClassVar, Protocol

from fts.trainer.arguments.argument_names import check_attribute_name
from fts.trainer.arguments.conflicts import ConflictArguments, check_conflicts
from fts.trainer.arguments.defaults import ALIASES, DefaultArguments, derive_defaults, mark_explicit
from fts.trainer.arguments.requirements import RequirementArguments, check_requirement, check_requirements
from fts.trainer.arguments.strategy import StrategyArguments, check_strategy
from fts.trainer.arguments.tf32 import apply_tf32
from fts.trainer.arguments.unsupported import check_supported
from fts.trainer.arguments.validators import VALIDATORS, parse_dict


class ValidatedArguments(ConflictArguments, DefaultArguments, RequirementArguments, StrategyArguments, Protocol):
    """The members of TrainingArguments that its checks use."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    _VALID_DICT_FIELDS: ClassVar[list[str]]

    tf32: bool | None


def set_argument(args: ValidatedArguments, name: str, value: Any) -> None:
    """Set an attribute of the arguments after checking its name and value.

    During construction only the value itself is checked; conflicts are checked once all values are set.
    """
    if name.startswith("_"):
        object.__setattr__(args, name, value)
        return
    if name not in type(args).__dataclass_fields__:
        check_attribute_name(type(args), name)
        object.__setattr__(args, name, value)
        return
    value = _parse_custom_dict(args, name, validate_value(name, value))
    finalized = is_finalized(args)
    if finalized:
        check_requirement(args, name, value)
    object.__setattr__(args, name, value)
    if finalized:
        _update_derived(args, name, value)


def validate_value(name: str, value: Any) -> Any:
    """The value to store for an argument.

    Raises:
        ArgumentError: it cannot work, or turns on what fts does not have yet.
    """
    validator = VALIDATORS.get(name)
    stored = value if validator is None else validator(name, value)
    check_supported(name, stored, given=value)
    return stored


def _parse_custom_dict(args: ValidatedArguments, name: str, value: Any) -> Any:
    """The value; JSON text becomes a dictionary where a subclass lists the name in `_VALID_DICT_FIELDS`."""
    is_json = isinstance(value, str) and value.lstrip().startswith("{")
    return parse_dict(name, value) if is_json and name in type(args)._VALID_DICT_FIELDS else value


def _update_derived(args: ValidatedArguments, name: str, value: Any) -> None:
    if name in ALIASES:
        object.__setattr__(args, ALIASES[name], value)
    mark_explicit(args, name, value)
    derive_defaults(args)
    apply_tf32(args.tf32, torch_compile=args.torch_compile, fp16=args.fp16)


def is_finalized(args: object) -> bool:
    """Whether the arguments are complete: filled in and checked."""
    return "_finalized" in args.__dict__


def finalize(args: ValidatedArguments) -> None:
    """Fill in what was not given, and check conflicts and requirements."""
    derive_defaults(args)
    check_conflicts(args)
    check_requirements(args)
    check_strategy(args)
    apply_tf32(args.tf32, torch_compile=args.torch_compile, fp16=args.fp16)
    object.__setattr__(args, "_finalized", True)


def finalize_after(post_init: Callable[..., None]) -> Callable[..., None]:
    """A subclass's `__post_init__` that finalizes the arguments also if it does not call `super().__post_init__()`."""

    @wraps(post_init)
    def wrapper(self: ValidatedArguments, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        if is_finalized(self):
            check_conflicts(self)  # it may have changed arguments after the base class checked them
        else:
            finalize(self)

    return wrapper
