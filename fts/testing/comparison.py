"""Comparison of trees of tensors, and the error of a broken law."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import optree
import torch
from torch import Tensor

from fts.errors import FtsError
from fts.state import TrainState
from fts.typing import Transform

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
"""The tolerance by dtype, relative to the size of the numbers involved.

That of float64 checks the formula. The others leave room for rounding: in 16 bits about ten roundings, since a moment squares a
gradient that was itself rounded; a division by a small number enlarges them.
"""


class LawError(FtsError, AssertionError):
    """A transform or a step breaks a law of `fts.testing`."""


def transform_summary(transform: Transform) -> str:
    """A transform and its parts, in one line.

    >>> from fts import transforms as tx
    >>> transform_summary(tx.chain(tx.scale(2.0), tx.sgd(0.1)))
    'chain(scale(2.0); sgd(lr=0.1))'
    """
    return transform.label + (f"({'; '.join(map(transform_summary, transform.children))})" if transform.children else "")


@contextmanager
def law(name: str, subject: str) -> Iterator[None]:
    """Name the law and its subject in every error inside the block.

    Args:
        name: of the law.
        subject: the transform's label, or a summary of the step.

    Raises:
        LawError: the block raised; the original exception is the cause, unless it was a LawError.

    >>> with law("inputs_unchanged", "sgd(0.1)"):
    ...     fail("grads['w'] was written")
    Traceback (most recent call last):
        ...
    fts.testing.comparison.LawError: sgd(0.1) breaks the law inputs_unchanged: grads['w'] was written
    """
    prefix = f"{subject} breaks the law {name}: "
    try:
        yield
    except LawError as error:
        text = str(error)
        raise LawError(text if " breaks the law " in text else prefix + text) from error.__cause__
    except Exception as error:  # any error of a user's function breaks the law
        text = " ".join(str(error).split())[:600]
        raise LawError(f"{prefix}it raised {type(error).__name__}: {text}") from error


def fail(message: str) -> NoReturn:
    """Raise LawError; `law` adds its name."""
    raise LawError(message)


def clone_tree(tree: Any) -> Any:
    """The same tree with every tensor copied, strides included; values that are no tensors are kept."""
    return optree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def require_equal(what: str, found: Any, expected: Any) -> None:
    """Raise LawError unless two trees have the same structure and the same bits.

    Args:
        what: a name of the trees, for the message.
        found: the result.
        expected: the expected result.

    >>> require_equal("updates", {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])})
    Traceback (most recent call last):
        ...
    fts.testing.comparison.LawError: updates['w'] is tensor([1.]), expected tensor([2.])
    """
    for path, one, two in _pairs(what, found, expected):
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            if one is not two and one != two:
                fail(f"{path} is {one!r}, expected {two!r}")
        elif not _same_bits(one, two):
            fail(f"{path} is {format_tensor(one)}, expected {format_tensor(two)}")


def require_close(
    what: str, found: Any, expected: Any, *, scale: float = 0.0, tolerance_factor: float = 1.0, inputs: Any = ()
) -> None:
    """Raise LawError unless two trees have the same structure and dtypes, and values equal to rounding.

    Where NaN or infinity is expected, any value that is not finite passes.

    Args:
        what: a name of the trees, for the message.
        found: the result.
        expected: the expected result.
        scale: the size of the inputs, relative to which cancellation leaves errors.
        tolerance_factor: multiplies the tolerance.
        inputs: the tensors that the values were computed from: a float32 norm of bfloat16 gradients is as precise as
            these.

    >>> require_close("updates", {"w": torch.tensor([1.0])}, {"w": torch.tensor([1.0 + 1e-7])})
    """
    input_tolerance = max((TOLERANCE.get(tensor.dtype, 0.0) for tensor in tree_tensors(inputs)), default=0.0)
    for path, one, two in _pairs(what, found, expected):
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            if one is not two and one != two:
                fail(f"{path} is {one!r}, expected {two!r}")
            continue
        tolerance = TOLERANCE.get(two.dtype)
        if tolerance is None:
            if not _same_bits(one, two):
                fail(f"{path} is {format_tensor(one)}, expected {format_tensor(two)}")
            continue
        bound = tolerance_factor * max(tolerance, input_tolerance) * max(max_abs(two), scale)
        if not torch.allclose(_plain(one), _plain(two), rtol=0.0, atol=bound, equal_nan=True):
            fail(f"{path} is {format_tensor(one)}, expected {format_tensor(two)} (within {bound:.3g})")


def max_abs(*trees: Any) -> float:
    """The largest finite absolute value in trees of tensors."""
    largest = 0.0
    for leaf in tree_tensors(trees):
        if leaf.numel():
            largest = max(largest, float(leaf.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()))
    return largest


def tree_tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree."""
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def named_tensors(what: str, tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by a readable path, such as `state.mu['w']`."""
    return {path: leaf for path, leaf in _named(what, tree) if isinstance(leaf, Tensor)}


def storage_ptrs(tensors: Iterable[Tensor]) -> set[int]:
    """The addresses of the storages of tensors that are not empty."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def format_tensor(tensor: Tensor) -> str:
    """A tensor in one short line."""
    text = " ".join(str(tensor.detach()).split())
    return text if len(text) <= 200 else f"{text[:200]}... of shape {list(tensor.shape)}"


def _named(what: str, tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, TrainState):
        # optree numbers the attributes of a state; messages need names
        parts = {name: getattr(tree, name) for name in ("params", "frozen", "buffers", "opt_state", "step")}
        return [pair for name, part in parts.items() for pair in _named(f"{what}.{name}", part)]
    accessors, leaves, _ = optree.tree_flatten_with_accessor(tree)
    return [(accessor.codify(what), leaf) for accessor, leaf in zip(accessors, leaves, strict=True)]


def _pairs(what: str, found: Any, expected: Any) -> list[tuple[str, Any, Any]]:
    ours, theirs = dict(_named(what, found)), dict(_named(what, expected))
    if ours.keys() != theirs.keys() or optree.tree_structure(found) != optree.tree_structure(expected):
        missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        fail(
            f"{what} has another structure than expected: missing {missing or 'nothing'}, unexpected {extra or 'nothing'} "
            f"({optree.tree_structure(found)}, expected {optree.tree_structure(expected)})"
        )
    for path, one in ours.items():
        two = theirs[path]
        if isinstance(one, Tensor) and isinstance(two, Tensor) and (one.shape != two.shape or one.dtype != two.dtype):
            fail(f"{path} is {one.dtype}{list(one.shape)}, expected {two.dtype}{list(two.shape)}")
    return [(path, one, theirs[path]) for path, one in ours.items()]


def _plain(tensor: Tensor) -> Tensor:
    wide = tensor.detach().double()
    return torch.where(wide.isfinite(), wide, float("nan"))


def _same_bits(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, two)
    return bool(((one == two) | (one.isnan() & two.isnan())).all())
