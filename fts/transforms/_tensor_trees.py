"""What torch optimizers keep (tensors, numbers, nested lists), as trees of tensors, and back."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fts.dtensors import full_tensor, redistribute, reduce_partial
from fts.errors import ArgumentError


class Integer(NamedTuple):
    """A Python int as a 0-d int64 tensor on the CPU."""

    integer: Tensor


class Floating(NamedTuple):
    """A Python float as a 0-d float64 tensor on the CPU."""

    floating: Tensor


class Truth(NamedTuple):
    """A Python bool as a 0-d bool tensor on the CPU."""

    truth: Tensor


class Nothing(NamedTuple):
    """None."""


Tree: TypeAlias = Any
"""A tensor, one of the four above, or a dictionary, list or tuple of trees."""

_NUMBERS = (Integer, Floating, Truth)


def encode(value: Any, where: str) -> Tree:
    """A value as a tree of tensors; the tensors are the value's own.

    Raises:
        ArgumentError: there is something in it that is no tensor, number, None or container of these.
    """
    if isinstance(value, Tensor):
        return _done(value.detach() if value.requires_grad else value)
    if value is None or isinstance(value, Real):
        return _number(value)
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return {key: encode(child, f"{where}[{key!r}]") for key, child in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        children = [encode(child, f"{where}[{i}]") for i, child in enumerate(value)]
        return tuple(children) if isinstance(value, tuple) else children
    raise ArgumentError(
        f"{where} is {value!r:.80} ({type(value).__name__}). A state is made of tensors and numbers, so that it can be saved and "
        "replayed; from_torch cannot represent this one."
    )


def decode(tree: Tree) -> Any:
    """The value that `encode` was given. Tensors are the tree's own, containers are new."""
    if isinstance(tree, Tensor):
        return tree
    if isinstance(tree, _NUMBERS):
        return tree[0].item()
    if isinstance(tree, Nothing):
        return None
    if isinstance(tree, dict):
        return {key: decode(child) for key, child in tree.items()}
    return type(tree)([decode(child) for child in tree])


def encode_like(value: Any, form: Tree, where: str) -> Tree:
    """As `encode`, for a value that must have the structure, shapes and dtypes of `form`.

    Raises:
        ArgumentError: it has another.
    """
    if value is form:
        return value
    if isinstance(form, dict) and isinstance(value, dict) and value.keys() == form.keys():
        return {
            key: child if value[key] is child else encode_like(value[key], child, f"{where}[{key!r}]")
            for key, child in form.items()
        }
    if type(value) is type(form) in (list, tuple) and len(value) == len(form):
        return type(form)([encode_like(one, two, f"{where}[{i}]") for i, (one, two) in enumerate(zip(value, form, strict=True))])
    return fitted(encode(value, where), form, where)


def fitted(tree: Tree, form: Tree, where: str) -> Tree:
    """`tree` in the structure of `form`, where an int may stand for a float.

    Raises:
        ArgumentError: the structure, a shape or a dtype differs.
    """
    if isinstance(form, Floating) and isinstance(tree, Integer):
        return Floating(tree.integer.double())
    if type(tree) is not type(form) and not (isinstance(tree, Tensor) and isinstance(form, Tensor)):
        _complain(where, tree, form)
    if isinstance(form, Tensor):
        if (tree.shape, tree.dtype, tree.device) != (form.shape, form.dtype, form.device):
            _complain(where, tree, form)
        return redistribute(tree, form)
    if isinstance(form, (*_NUMBERS, Nothing)):
        return tree
    if isinstance(form, dict):
        if tree.keys() != form.keys():
            _complain(where, tree, form)
        return {key: fitted(tree[key], child, f"{where}[{key!r}]") for key, child in form.items()}
    if len(tree) != len(form):
        _complain(where, tree, form)
    return type(form)([fitted(one, two, f"{where}[{i}]") for i, (one, two) in enumerate(zip(tree, form, strict=True))])


def common_structure(first: Tree, second: Tree, where: str) -> Tree:
    """The form of two states of one optimizer: a number that was ever a float is one.

    Raises:
        ArgumentError: their structures differ otherwise.
    """
    if isinstance(first, Floating) and isinstance(second, Integer):
        return Floating(second.integer.double())
    if isinstance(first, Integer) and isinstance(second, Floating):
        return second
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: common_structure(first[key], child, f"{where}[{key!r}]") for key, child in second.items()}
    return fitted(second, first, where)


def same(one: Any, other: Any) -> bool:
    """Whether two values of an optimizer are equal, also as to their types."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def copied(value: Any) -> Any:
    """The value with its tensors and containers copied; anything else is kept."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(child) for key, child in value.items()}
    if type(value) in (list, tuple):
        return type(value)([copied(child) for child in value])
    return value


def _done(tensor: Tensor) -> Tensor:
    """Without partial placements; a sharded tensor of one number becomes a plain one."""
    return full_tensor(tensor) if tensor.ndim == 0 else reduce_partial(tensor)


def _number(value: Any) -> Tree:
    if value is None:
        return Nothing()
    if isinstance(value, bool):
        return Truth(torch.tensor(value))
    if isinstance(value, Integral):
        return Integer(torch.tensor(int(value)))
    return Floating(torch.tensor(float(value), dtype=torch.float64))


def _complain(where: str, tree: Tree, form: Tree) -> Any:
    raise ArgumentError(
        f"{where} became {_in_words(tree)}; before, it was {_in_words(form)}. from_torch needs an optimizer whose state keeps "
        "its structure from its first step on."
    )


def _in_words(tree: Tree) -> str:
    if isinstance(tree, Tensor):
        return f"a {tree.dtype} tensor of shape {list(tree.shape)} on {tree.device}"
    if isinstance(tree, dict):
        return f"a dictionary of {sorted(tree, key=str)}"
    if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    return {Integer: "an int", Floating: "a float", Truth: "a bool", Nothing: "None"}.get(type(tree), type(tree).__name__)
