"""Hypothesis strategies for parameters, gradients and trajectories.

>>> tree = params(dtypes=[torch.float32]).example()  # doctest: +SKIP
>>> tree  # doctest: +SKIP
{'a': tensor(0.)}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from fts.typing import Params

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

VALUE_KINDS = ("normal", "zeros", "mixed", "tiny", "huge", "equal")
"""Kinds of values of a tensor; their squares are finite."""


class Trajectory(NamedTuple):
    """Parameters, and the gradients of successive updates."""

    params: Params
    gradients: list[Params]


def names() -> SearchStrategy[str]:
    """Parameter names as modules have them, such as `w`, `0.weight` or `layers.1.attention.bias`.

    Returns:
        A strategy for strings.
    """
    part = r"[a-z_][a-z0-9_]{0,4}"
    return st.one_of(
        st.sampled_from(["w", "b", "0.weight", "0.bias", "lr", "mu.w", "layers.10.norm.weight"]),
        st.from_regex(rf"{part}(\.({part}|[0-9])){{0,2}}", fullmatch=True),
    )


def shapes(*, empty: bool = True) -> SearchStrategy[tuple[int, ...]]:
    """Shapes of zero to three axes of length 1 to 4, and some with enough numbers for vectorized kernels.

    Args:
        empty: sometimes an axis has the length 0.

    Returns:
        A strategy for tuples.
    """
    small = st.lists(st.integers(1, 4), max_size=3).map(tuple)
    # a vectorized kernel may treat the last elements differently: 64 bytes have 8 to 32 numbers
    large = st.sampled_from([(33,), (5, 13), (64,), (3, 4, 7)])
    return st.one_of(small, small, large, st.sampled_from([(0,), (3, 0)])) if empty else st.one_of(small, small, large)


@st.composite
def tensors(draw: DrawFn, shape: tuple[int, ...], dtype: torch.dtype, *, nonfinite: bool = False, strided: bool = True) -> Tensor:
    """Tensors with values of one kind: normal, zero, partly zero, tiny, huge, or all equal.

    Args:
        draw: from Hypothesis.
        shape: of the tensor.
        dtype: a floating dtype.
        nonfinite: sometimes one value is NaN or infinite.
        strided: sometimes permute the axes, so that the memory is not contiguous.

    Returns:
        A strategy for tensors.
    """
    kind = draw(st.sampled_from(VALUE_KINDS))
    # one integer instead of a number for each value, so that thousands of trees are generated in seconds
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    permuted = strided and len(shape) > 1 and draw(st.integers(0, 4)) == 4
    values = torch.randn(shape[::-1] if permuted else shape, dtype=torch.float64, generator=generator)
    if kind == "zeros":
        values.zero_()
    elif kind == "mixed":
        values *= torch.rand(values.shape, generator=generator) < 0.5
    elif kind in ("tiny", "huge"):
        values *= 1e-15 if kind == "tiny" else 1e15
    elif kind == "equal":
        values.fill_(0.5)
    if nonfinite and values.numel() and draw(st.integers(0, 3)) == 3:
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(
            st.sampled_from([float("nan"), float("inf"), -float("inf")])
        )
    tensor = values.to(dtype)
    return tensor.permute(*range(len(shape))[::-1]) if permuted else tensor


@st.composite
def params(
    draw: DrawFn,
    *,
    named: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    max_size: int = 4,
    empty: bool = True,
) -> Params:
    """Parameters: one to `max_size` tensors by name, mostly of one dtype.

    Args:
        draw: from Hypothesis.
        named: the names, for transforms that need certain ones; None generates some.
        dtypes: to choose from.
        max_size: the largest number of generated names.
        empty: sometimes a tensor has no values.

    Returns:
        A strategy for dictionaries.
    """
    chosen = list(named) if named is not None else draw(st.lists(names(), min_size=1, max_size=max_size, unique=True))
    common = draw(st.sampled_from(list(dtypes)))
    mixed = draw(st.integers(0, 7)) == 7
    tree: Params = {}
    for name in chosen:
        dtype = draw(st.sampled_from(list(dtypes))) if mixed else common
        tree[name] = draw(tensors(draw(shapes(empty=empty)), dtype))
    return tree


@st.composite
def grads_like(draw: DrawFn, params: Params, *, nonfinite: bool = False) -> Params:
    """Gradients with the names, shapes and dtypes of parameters.

    Args:
        draw: from Hypothesis.
        params: the parameters.
        nonfinite: sometimes a value is NaN or infinite.

    Returns:
        A strategy for dictionaries.
    """
    return {name: draw(tensors(tuple(p.shape), p.dtype, nonfinite=nonfinite)) for name, p in params.items()}


@st.composite
def trajectories(
    draw: DrawFn, tree: SearchStrategy[Params] | None = None, *, length: int = 3, nonfinite: bool = False
) -> Trajectory:
    """Parameters and the gradients of one to `length` updates.

    Args:
        draw: from Hypothesis.
        tree: of the parameters; `params()` where None.
        length: the largest number of updates.
        nonfinite: sometimes a gradient is NaN or infinite.

    Returns:
        A strategy for `Trajectory`.
    """
    start = draw(params() if tree is None else tree)
    count = draw(st.integers(1, length))
    return Trajectory(start, [draw(grads_like(start, nonfinite=nonfinite)) for _ in range(count)])


def fixed_trajectory(dtype: torch.dtype, *, length: int = 3) -> Trajectory:
    """A fixed trajectory of normal numbers, with a tensor that is longer than a vector register.

    Args:
        dtype: of all tensors.
        length: the number of updates.

    Returns:
        The trajectory.

    >>> sorted(fixed_trajectory(torch.float32).params)
    ['layers.0.bias', 'layers.0.weight', 'temperature']
    """
    generator = torch.Generator().manual_seed(0)
    shapes_by_name = {"layers.0.weight": (5, 13), "layers.0.bias": (64,), "temperature": ()}

    def tree() -> Params:
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes_by_name.items()}

    return Trajectory(tree(), [tree() for _ in range(length)])
