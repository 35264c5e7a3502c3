"""One step and one shape of batch as one graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, NamedTuple, cast

import attrs
import optree
import torch
from torch import Tensor

from fts.randomness import STEP, fold, generator_states, same_states, seed_generators
from fts.state import TrainState
from fts.steps.tracing import device_of
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
        rank: the number of this process among those that take the same step, for which it is seeded.
        draws: whether it draws random numbers, so that it must be seeded; None until the first call has shown it.
    """

    run: Callable[..., tuple[GraphState | list[Tensor], Metrics]]
    code: Any
    rank: int = 0
    draws: bool | None = None

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        parts = GraphState(state.params, state.frozen, state.buffers, state.opt_state, state.step)
        if self.draws is False:
            after, metrics = self.run(parts, batch, *args)
        else:
            device = device_of(state.params)
            seed_generators(fold(state.seed, STEP, int(state.step), self.rank), device)
            before = generator_states(device) if self.draws is None else None
            with nullcontext() if before is None else _without_logging():
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


def graph_of(step: Callable[..., Any], *, donate: bool, backend: str, options: dict[str, Any], rank: int = 0) -> Graph:
    """Compile a step; the work is done when the graph is first called.

    Args:
        step: pure and traceable.
        donate: write the new state over the old one, at the end of the graph, so that the graph needs no new storage.
        backend: of `torch.compile`.
        options: further arguments of `torch.compile`.
        rank: see `Graph`.
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

    own = with_own_code(cast(FunctionType, run))
    return Graph(torch.compile(own, fullgraph=True, dynamic=False, backend=backend, **options), own.__code__, rank)


def is_compile_error(error: BaseException) -> bool:
    """Whether an error comes from compiling, and not from running, a step."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    return isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit, InductorError, InvalidCxxCompiler))


def reason_of(error: BaseException) -> str:
    """Why a step was not compiled, in a sentence or two out of torch's page."""
    text = str(error)
    if "InvalidCxxCompiler" in f"{type(error).__name__} {text}":
        return "No C++ compiler was found; install one (g++ or clang) to compile on a CPU."
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return (
            "Something in Python that the graph depends on changes from step to step, such as a number in a closure. Make it a "
            "0-d tensor in the batch, or behind the batch."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    context = next((line for line in lines if line.startswith("Developer debug context:")), "")
    frames = [line for line in lines if line.startswith("File ") and "/fts/" not in line and "/torch/" not in line]
    parts = [f"{type(error).__name__}: {lines[0] if lines else ''}", context, *frames[-1:]]
    return " ".join(part.rstrip(".") + "." for part in parts if part)


def _without_logging() -> AbstractContextManager[Any]:
    # calls of a logger in a model (GPT-2 has one) would break the graph
    from torch._dynamo import config

    names = ("debug", "info", "warning", "error", "warning_once", "info_once")
    functions = {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}
    return config.patch(ignore_logging_functions=functions | config.ignore_logging_functions)  # type: ignore[no-any-return]


def _is_scalar(tensor: Tensor) -> bool:
    # torch 2.13 loses what a graph writes into a 0-d float64 tensor on the CPU: it takes such an input for a number
    return tensor.ndim == 0 and tensor.dtype == torch.float64 and tensor.device.type == "cpu"


def _with_scalars(parts: GraphState, fresh: list[Tensor]) -> GraphState:
    tree = (parts.opt_state, parts.buffers, parts.step, parts.params)
    leaves, structure = optree.tree_flatten(cast(Any, tree))  # in the order of _tensors
    remaining = iter(fresh)
    leaves = [next(remaining) if _is_scalar(leaf) else leaf for leaf in leaves]
    opt_state, buffers, step, params = optree.tree_unflatten(structure, leaves)
    return parts.replace(params=params, buffers=buffers, opt_state=opt_state, step=step)


def _tensors(parts: GraphState) -> list[Tensor]:
    leaves: list[Tensor] = []
    # the parameters last: what a transform keeps of them may be a view
    for tree in (parts.opt_state, parts.buffers, parts.step, parts.params):
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


def with_own_code(function: FunctionType) -> FunctionType:
    """The same function under a code object of its own.

    dynamo keeps its graphs by code object: one for each shape keeps its guards few and its limit on graphs away.
    """
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
