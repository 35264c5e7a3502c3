"""Parameters, gradients, and the two ways to run a transform over them."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fts import transforms as tx
from fts.typing import Info, OptState, Params, Transform

SHAPES = {"w": (3, 4), "b": (3,), "kernel": (2, 3, 2, 2), "s": ()}


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def make_gradients(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Params]:
    """Gradients of growing and shrinking size, so that clipping at 1 acts on some and not on others."""
    return [{name: g * (0.02 + (i % 7) / 7.0) for name, g in make_params(dtype, seed * 1_000 + i).items()} for i in range(count)]


def copy(tree: Any) -> Any:
    return pytree.tree_map(Tensor.clone, tree)


def by_update(transform: Transform, params: Params, gradients: Iterable[Params]) -> tuple[Params, OptState, Info]:
    """Fold the pure update."""
    state, info = transform.init(params), {}
    for grads in gradients:
        updates, state, info = transform.update(grads, state, params)
        params = tx.apply_updates(params, updates)
    return params, state, info


def by_apply(transform: Transform, params: Params, gradients: Iterable[Params]) -> tuple[Params, OptState, Info]:
    """Fold the fast path, on copies, with gradients that are spoilt after each step."""
    assert transform.apply is not None
    params = copy(params)
    state, info = transform.init(params), {}
    with torch.no_grad():
        for grads in gradients:
            own = copy(grads)
            params, state, info = transform.apply(own, state, params)
            for tensor in own.values():
                tensor.fill_(float("nan"))
    return params, state, info


def assert_close(found: Any, expected: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Equal structure, dtypes, and values within the tolerances."""
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for one, two in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol, equal_nan=True)
