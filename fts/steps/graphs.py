"""One step and one shape of batch as one graph."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, cast

import attrs
import optree
import torch
from torch import Tensor

from fts.randomness import STEP, fold, generator_states, same_states, seed_generators
from fts.state import TrainState
from fts.steps.gradients import device_of
from fts.typing import Batch, Metrics, OptState, Params


class GraphState(NamedTuple):
    """A TrainState as a graph sees it: the same attributes, in a type that a graph can build."""

    params: Params
    frozen: Params
    buffers: Params
    opt_state: OptState
    step: Tensor
    seed: int = 0

    def replace(self, **changes: Any) -> GraphState:
        """As `TrainState.replace`."""
        return self._replace(**changes)


@attrs.define(eq=False)
class Graph:
    """A compiled step for batches of one shape; made by `graph_of`.

    Attributes:
        run: `run(parts, batch, *args) -> (parts, metrics)`; or, where the parts were written in place, the few numbers that
            could not be, instead of parts.
        code: the code object under which dynamo keeps what it compiled.
        draws: whether it draws random numbers, so that it must be seeded; None until the first call has shown it.
    """

    run: Callable[..., tuple[GraphState | list[Tensor], Metrics]]
    code: Any
    draws: bool | None = None

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        parts = GraphState(state.params, state.frozen, state.buffers, state.opt_state, state.step)
        if self.draws is False:
            after, metrics = self.run(parts, batch, *args)
        else:
            device = device_of(state.params)
            seed_generators(fold(state.seed, STEP, int(state.step), 0), device)
            before = generator_states(device) if self.draws is None else None
            after, metrics = self.run(parts, batch, *args)
            if before is not None:
                # a graph always draws the same count of numbers; most draw none, and seeding costs a tenth of a small step
                self.draws = not same_states(before, generator_states(device))
        if not isinstance(after, GraphState):
            after = _with_scalars(parts, after) if after else parts
        new = TrainState(after.params, state.frozen, after.buffers, after.opt_state, after.step, state.seed, state.layout)
        return new, metrics

    @property
    def compilations(self) -> int:
        """How often dynamo compiled this graph: once, and again when something that it guards changed."""
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        return len(_debug_get_cache_entry_list(self.code))


def graph_of(step: Callable[..., Any], *, donate: bool, backend: str, options: dict[str, Any]) -> Graph:
    """Compile a step; the work is done when the graph is first called.

    Args:
        step: pure and traceable.
        donate: write the new state over the old one, at the end of the graph, so that the graph needs no new storage.
        backend: of `torch.compile`.
        options: further arguments of `torch.compile`.
    """

    def run(parts: GraphState, batch: Batch, *args: Any) -> tuple[Any, Metrics]:
        after, metrics = step(parts, batch, *args)
        if not donate:
            return after, metrics
        old, new = _tensors(parts), _tensors(after)
        given = dict.fromkeys(old)
        # a transform may keep an input as its state (the last parameters): read it before anything is written
        new = [b.clone() if a is not b and b in given else b for a, b in zip(old, new, strict=True)]
        fresh = []
        with torch.no_grad():
            for a, b in zip(old, new, strict=True):
                if _is_scalar(a):
                    fresh.append(b)
                elif a is not b:
                    a.copy_(b)
        return fresh, metrics

    own = _with_own_code(cast(FunctionType, run))
    return Graph(torch.compile(own, fullgraph=True, dynamic=False, backend=backend, **options), own.__code__)


def _is_scalar(tensor: Tensor) -> bool:
    # torch 2.13 loses what a graph writes into a 0-d float64 tensor on the CPU: it takes such an input for a number
    return tensor.ndim == 0 and tensor.dtype == torch.float64 and tensor.device.type == "cpu"


def _with_scalars(parts: GraphState, fresh: list[Tensor]) -> GraphState:
    tree = (parts.params, parts.buffers, parts.opt_state, parts.step)
    leaves, structure = optree.tree_flatten(cast(Any, tree))  # in the order of _tensors
    remaining = iter(fresh)
    leaves = [next(remaining) if _is_scalar(leaf) else leaf for leaf in leaves]
    params, buffers, opt_state, step = optree.tree_unflatten(structure, leaves)
    return parts.replace(params=params, buffers=buffers, opt_state=opt_state, step=step)


def _tensors(parts: GraphState) -> list[Tensor]:
    leaves: list[Tensor] = []
    for tree in (parts.params, parts.buffers, parts.opt_state, parts.step):
        _collect(tree, leaves)
    return leaves


def _collect(tree: Any, leaves: list[Tensor]) -> None:
    # by hand, because a graph cannot look into optree's registry
    if isinstance(tree, Tensor):
        leaves.append(tree)
    elif isinstance(tree, dict):
        for key in sorted(tree):
            _collect(tree[key], leaves)
    elif isinstance(tree, (tuple, list)):
        for child in tree:
            _collect(child, leaves)


def _with_own_code(function: FunctionType) -> FunctionType:
    # dynamo keeps its graphs by code object; one for each shape keeps its guards few and its limit on graphs away
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
