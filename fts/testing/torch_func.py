"""Laws of `torch.func`: an update can be vmapped over a population and differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fts.testing.comparison import fail, law, max_abs, require_close, transform_summary
from fts.typing import OptState, Params, Transform


def vmapped_equals_loop(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """`update` under `torch.vmap` over a population of two equals two updates.

    Args:
        transform: to check.
        params: the parameters of the first member; the second has half of them.
        gradients: of successive updates.

    Raises:
        LawError: vmap fails, or the results differ.
    """
    with law("vmapped_equals_loop", transform_summary(transform)):
        members = [params, {name: tensor * 0.5 for name, tensor in params.items()}]
        states = [transform.init(member) for member in members]
        vmapped = torch.vmap(transform.update)
        many = _stacked(states)
        scale = max_abs(params, gradients)
        for grads in gradients:
            given = [grads, {name: tensor * 2 for name, tensor in grads.items()}]
            results = [transform.update(*each) for each in zip(given, states, members, strict=True)]
            found = vmapped(_stacked(given), many, _stacked(members))
            for what, index in (("updates", 0), ("state", 1), ("info", 2)):
                expected = _stacked([result[index] for result in results])
                require_close(f"the vmapped {what}", found[index], expected, scale=2 * scale, inputs=params)
            many, states = found[1], [result[1] for result in results]


def differentiable(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """The derivative of the updates with respect to gradients and parameters equals finite differences.

    It is taken in float64, at random nonzero values of ordinary size, not at those of `params` and `gradients`.

    Args:
        transform: to check.
        params: for the names and shapes.
        gradients: for the number of updates.

    Raises:
        LawError: the derivative fails, is not finite, or is wrong (as by `.detach()`, or NaN in a `torch.where`).
    """
    if not any(tensor.numel() for tensor in params.values()):
        return
    with law("differentiable", transform_summary(transform)):
        generator = torch.Generator().manual_seed(0)
        trees = [_ordinary(params, generator) for _ in range(len(gradients) + 1)]
        directions = [_ordinary(params, generator) for _ in trees]
        weights = _ordinary(params, generator)

        def run(trees: list[Params]) -> Tensor:
            weights_now, *slopes = trees
            state: OptState = transform.init(weights_now)
            total = torch.zeros((), dtype=torch.float64)
            for grads in slopes:
                updates, state, _ = transform.update(grads, state, weights_now)
                weights_now = {name: p + updates[name] for name, p in weights_now.items()}
            for name, tensor in weights_now.items():
                total = total + (weights[name] * tensor).sum()
            return total

        def moved(distance: float) -> list[Params]:
            return [
                {name: tensor + distance * direction[name] for name, tensor in tree.items()}
                for tree, direction in zip(trees, directions, strict=True)
            ]

        slopes = torch.func.grad(run)(trees)
        for index, tree in enumerate(slopes):
            for name, slope in tree.items():
                if not slope.isfinite().all():
                    where = "params" if index == 0 else f"the gradients of update {index}"
                    fail(f"the derivative with respect to {name!r} of {where} is not finite: {slope}")
        found = sum(
            float((slope[name] * direction[name]).sum())
            for slope, direction in zip(slopes, directions, strict=True)
            for name in slope
        )
        step = 1e-6
        numeric = float((run(moved(step)) - run(moved(-step))) / (2 * step))
        if abs(found - numeric) > 1e-4 * (1 + abs(numeric)):
            fail(f"the derivative along one direction is {found:.8g} by autograd and {numeric:.8g} by finite differences")


def _stacked(trees: Sequence[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def _ordinary(like: Params, generator: torch.Generator) -> Params:
    tree = {}
    for name, tensor in like.items():
        values = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
        tree[name] = values + 0.3 * torch.where(values < 0, -1.0, 1.0)
    return tree
