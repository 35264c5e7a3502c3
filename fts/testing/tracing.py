"""Laws of tracing: torch.compile traces a transform to one graph, once, with the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from fts.steps.step_graph import with_new_code_object
from fts.testing.comparison import fail, law, max_abs, require_close, transform_summary
from fts.typing import Info, OptState, Params, Transform


def traced_equals_eager(transform: Transform, params: Params, gradients: Sequence[Params], *, backend: str = "eager") -> None:
    """`init` and the first update inside one graph give the same results as eagerly.

    Args:
        transform: to check.
        params: the parameters, at which all updates are taken.
        gradients: of successive updates.
        backend: of torch.compile; the default needs no C++ compiler.

    Raises:
        LawError: the graph breaks, or its results differ.
    """

    def run(params: Params, gradients: list[Params]) -> tuple[Params, OptState, list[Info]]:
        state, infos = transform.init(params), []
        updates: Params = {}
        for grads in gradients:
            updates, state, info = transform.update(grads, state, params)
            infos.append(info)
        return updates, state, infos

    with law("traced_equals_eager", transform_summary(transform)):
        # one update, because tracing takes most of the time; `traced_once` does the others
        first = list(gradients[:1])
        expected = run(params, first)
        found = _compiled(run, backend)(params, first)
        _require_same(found, expected, params, gradients)


def traced_once(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """`update` with the state as an input is one graph for all updates.

    Args:
        transform: to check.
        params: the parameters, at which all updates are taken.
        gradients: of successive updates.

    Raises:
        LawError: the graph breaks, its results differ, or a later update compiles it again.
    """
    graphs = 0

    def counting_backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def run(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info]:
        return transform.update(grads, state, params)

    with law("traced_once", transform_summary(transform)):
        traced = _compiled(run, counting_backend)
        # a graph is for one memory format, so all tensors are made contiguous
        params, *gradients = [
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tree.items()}
            for tree in (params, *gradients)
        ]
        state = transform.init(params)
        for grads in (*gradients, *gradients, *gradients):
            # a new dictionary, since the graph must not depend on its identity
            found = traced({name: g.clone() for name, g in grads.items()}, state, params)
            expected = transform.update(grads, state, params)
            _require_same(found, expected, params, gradients)
            state = found[1]
        # a transform without tensor operations has no graph
        if graphs > 1:
            fail(f"{graphs} graphs were compiled in {3 * len(gradients)} updates; no Python number may change between updates")


def _compiled(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    assert isinstance(function, FunctionType)
    copy = with_new_code_object(function)  # graphs of one check must not serve another
    return torch.compile(copy, fullgraph=True, dynamic=False, backend=backend)


def _require_same(found: Any, expected: Any, params: Params, gradients: Sequence[Params]) -> None:
    scale = max_abs(params, gradients)
    for what, one, two in zip(("updates", "state", "info"), found, expected, strict=True):
        require_close(f"the graph's {what}", one, two, scale=scale, inputs=params)
