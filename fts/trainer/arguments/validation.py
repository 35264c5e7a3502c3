"""What happens when an argument gets a value: in the constructor, and whenever one is assigned later."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from fts.trainer.arguments.conflicts import check_contradictions
from fts.trainer.arguments.derived import TWINS, derive, note_choice
from fts.trainer.arguments.names import check_attribute
from fts.trainer.arguments.requirements import check_requirement, check_requirements
from fts.trainer.arguments.strategy import check_strategy
from fts.trainer.arguments.tf32 import apply_tf32
from fts.trainer.arguments.unsupported import check_is_there
from fts.trainer.arguments.value_checks import VALUES, dictionary

if TYPE_CHECKING:
    from fts.trainer.arguments.training_arguments import TrainingArguments


def assign(args: TrainingArguments, name: str, value: Any) -> None:
    """Set an attribute of the arguments, if its name and value can work.

    While the arguments are being made, only the value itself is checked; contradictions come when all are there.
    """
    if name.startswith("_"):
        object.__setattr__(args, name, value)
        return
    if name not in type(args).__dataclass_fields__:
        check_attribute(type(args), name)
        object.__setattr__(args, name, value)
        return
    value = _own_dictionary(args, name, checked(name, value))
    settled = is_settled(args)
    if settled:
        check_requirement(args, name, value)
    object.__setattr__(args, name, value)
    if settled:
        _follow(args, name, value)


def checked(name: str, value: Any) -> Any:
    """The value to keep for an argument.

    Raises:
        ArgumentError: it cannot work, or turns on what fts does not have yet.
    """
    check = VALUES.get(name)
    kept = value if check is None else check(name, value)
    check_is_there(name, kept, given=value)
    return kept


def _own_dictionary(args: TrainingArguments, name: str, value: Any) -> Any:
    """The value; a dictionary where a subclass lists the name among those that may be JSON text."""
    text = isinstance(value, str) and value.lstrip().startswith("{")
    return dictionary(name, value) if text and name in type(args)._VALID_DICT_FIELDS else value


def _follow(args: TrainingArguments, name: str, value: Any) -> None:
    if name in TWINS:
        object.__setattr__(args, TWINS[name], value)
    note_choice(args, name, value)
    derive(args)
    apply_tf32(args)


def is_settled(args: TrainingArguments) -> bool:
    """Whether the arguments are complete: filled in and checked."""
    return "_settled" in args.__dict__


def settle(args: TrainingArguments) -> None:
    """Fill in what was not given, and check that all of it can work here and together."""
    derive(args)
    check_contradictions(args)
    check_requirements(args)
    check_strategy(args)
    apply_tf32(args)
    object.__setattr__(args, "_settled", True)


def then_settle(post_init: Callable[..., None]) -> Callable[..., None]:
    """A subclass's `__post_init__`, after which the arguments are settled also where it forgets `super().__post_init__()`."""

    @wraps(post_init)
    def whole(self: TrainingArguments, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        if is_settled(self):
            check_contradictions(self)  # it may have changed arguments after the base class looked
        else:
            settle(self)

    return whole
