"""A step compiled to one graph, for one batch shape."""

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

from fts.randomness import get_rng_states, rng_states_equal, seed_microbatch
from fts.state import TrainState
from fts.steps.tracing import device_of
from fts.typing import Batch, Metrics, OptState, Params


class GraphState(NamedTuple):
    """The attributes of a TrainState, in a type that can be built inside a graph."""

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
class StepGraph:
    """A compiled step for batches of one shape; made by `compile_graph`.

    Attributes:
        run: `run(parts, batch, *args) -> (parts, metrics)`; if it donates, it writes the parts in place, and returns only the
            scalars that it could not write.
        code: the code object that dynamo caches the compiled graph by.
        rank: of this process, which the generators are seeded for.
        uses_rng: whether it draws random numbers, so that it must be seeded; None before the first call.
    """

    run: Callable[..., tuple[GraphState | list[Tensor], Metrics]]
    code: Any
    rank: int = 0
    uses_rng: bool | None = None

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        parts = GraphState(state.params, state.frozen, state.buffers, state.opt_state, state.step)
        if self.uses_rng is False:
            after, metrics = self.run(parts, batch, *args)
        else:
            device = device_of(state.params)
            seed_microbatch(state.seed, int(state.step), self.rank, device)
            before = get_rng_states(device) if self.uses_rng is None else None
            with nullcontext() if before is None else _without_logging():
                after, metrics = self.run(parts, batch, *args)
            if before is not None:
                # a graph always draws equally many numbers; most draw none, and seeding costs a tenth of a small step
                self.uses_rng = not rng_states_equal(before, get_rng_states(device))
        if not isinstance(after, GraphState):
            after = _with_scalars(parts, after) if after else parts
        new = TrainState(after.params, state.frozen, after.buffers, after.opt_state, after.step, state.seed, state.metadata)
        return new, metrics

    @property
    def compilations(self) -> int:
        """How often dynamo compiled this graph: once, and again after each guard failure."""
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        return len(_debug_get_cache_entry_list(self.code))


def compile_graph(step: Callable[..., Any], *, donate: bool, backend: str, options: dict[str, Any], rank: int = 0) -> StepGraph:
    """Compile a step to one graph, at its first call.

    Args:
        step: pure and traceable.
        donate: write the new state into the old one's storage, at the end of the graph.
        backend: as for `torch.compile`.
        options: further arguments of `torch.compile`.
        rank: see `StepGraph`.
    """

    def run(parts: GraphState, batch: Batch, *args: Any) -> tuple[Any, Metrics]:
        after, metrics = step(parts, batch, *args)
        if not donate:
            return after, metrics
        old, new = _tensors(parts), _tensors(after)
        inputs = dict.fromkeys(old)
        # a transform may return an input as its state (such as the last parameters): copy it before anything is written
        new = [b.clone() if a is not b and b in inputs else b for a, b in zip(old, new, strict=True)]
        scalars = []
        with torch.no_grad():
            for a, b in zip(old, new, strict=True):
                if _is_scalar(a):
                    scalars.append(b)
                elif a is not b:
                    a.copy_(b)
        return scalars, metrics

    own = with_new_code_object(cast(FunctionType, run))
    return StepGraph(torch.compile(own, fullgraph=True, dynamic=False, backend=backend, **options), own.__code__, rank)


def is_compile_error(error: BaseException) -> bool:
    """Whether an error comes from compiling a step, not from running it."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    return isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit, InductorError, InvalidCxxCompiler))


def compile_error_reason(error: BaseException) -> str:
    """Why a step was not compiled: a sentence or two of torch's message."""
    text = str(error)
    if "InvalidCxxCompiler" in f"{type(error).__name__} {text}":
        return "No C++ compiler was found; install one (g++ or clang) to compile on a CPU."
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return (
            "Something in Python that the graph depends on changes from step to step, such as a number in a closure. Make it a "
            "0-d tensor in the batch, or a further argument of the step."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    context = next((line for line in lines if line.startswith("Developer debug context:")), "")
    frames = [line for line in lines if line.startswith("File ") and "/fts/" not in line and "/torch/" not in line]
    parts = [f"{type(error).__name__}: {lines[0] if lines else ''}", context, *frames[-1:]]
    return " ".join(part.rstrip(".") + "." for part in parts if part)


def _without_logging() -> AbstractContextManager[Any]:
    # logging calls in a model (GPT-2 has one) would break the graph
    from torch._dynamo import config

    names = ("debug", "info", "warning", "error", "warning_once", "info_once")
    functions = {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}
    return config.patch(ignore_logging_functions=functions | config.ignore_logging_functions)  # type: ignore[no-any-return]


def _is_scalar(tensor: Tensor) -> bool:
    # torch 2.13 loses writes of a graph into a 0-d float64 CPU tensor: it treats such an input as a number
    return tensor.ndim == 0 and tensor.dtype == torch.float64 and tensor.device.type == "cpu"


def _with_scalars(parts: GraphState, scalars: list[Tensor]) -> GraphState:
    tree = (parts.opt_state, parts.buffers, parts.step, parts.params)
    leaves, structure = optree.tree_flatten(cast(Any, tree))  # in the order of _tensors
    remaining = iter(scalars)
    leaves = [next(remaining) if _is_scalar(leaf) else leaf for leaf in leaves]
    opt_state, buffers, step, params = optree.tree_unflatten(structure, leaves)
    return parts.replace(params=params, buffers=buffers, opt_state=opt_state, step=step)


def _tensors(parts: GraphState) -> list[Tensor]:
    leaves: list[Tensor] = []
    # the parameters last: the optimizer state may have views of them
    for tree in (parts.opt_state, parts.buffers, parts.step, parts.params):
        _collect(tree, leaves)
    return leaves


def _collect(tree: Any, leaves: list[Tensor]) -> None:
    # not by optree, whose registry cannot be traced
    if isinstance(tree, Tensor):
        leaves.append(tree)
    elif isinstance(tree, dict):
        for key in sorted(tree):
            _collect(tree[key], leaves)
    elif isinstance(tree, (tuple, list)):
        for child in tree:
            _collect(child, leaves)


def with_new_code_object(function: FunctionType) -> FunctionType:
    """A copy of a function with its own code object.

    dynamo caches graphs by code object: one for each shape has few guards, and stays below the limit of recompilations.
    """
    return FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
