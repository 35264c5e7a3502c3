"""The whole step as one graph: loss, gradients, transform and new state."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import attrs
import optree
from torch import Tensor

from fts.errors import ArgumentError, CompileFallbackWarning
from fts.state import TrainState, mark_donated
from fts.steps.binding import Binding
from fts.steps.gradients import ValueAndGrad
from fts.steps.graphs import Graph, graph_of, is_compile_error, reason_of
from fts.steps.manual_backward import ManualBackward
from fts.steps.nonfinite import IN_GRAPH, FiniteGradients
from fts.steps.train_step import TrainStep
from fts.steps.updates import check
from fts.typing import Batch, Metrics, StepFn

MAX_GRAPHS = 16
"""How many shapes of batch one step is compiled for; others run eagerly."""


@attrs.define(eq=False)
class Graphs:
    """The graphs that a compiled step has made so far; shared with its donating variant."""

    by_shape: dict[Hashable, Graph] = attrs.field(factory=dict)
    eager: bool = False


@attrs.frozen(eq=False)
class CompiledStep:
    """A step that runs as one graph; made by `compile`."""

    step: StepFn[Any]
    donate: bool
    backend: str
    options: dict[str, Any]
    graphs: Graphs = attrs.field(factory=Graphs)

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        if isinstance(batch, Mapping):
            # also Hugging Face's BatchEncoding, which no registry of trees knows; dynamo guards the order of keys
            batch = {key: batch[key] for key in sorted(batch, key=str)}
        graph = self._graph(state, batch, args)
        if graph is None:
            return self._eager()(state, batch, *args)
        try:
            with self._train_mode():
                new, metrics = graph(state, batch, *args)
        except BaseException as error:
            if not is_compile_error(error):
                if self.donate and graph.draws is not None:  # what a graph was doing when it was interrupted is unknown
                    mark_donated(state, "a compiled step, which failed")
                raise
            result = self._eager()(state, batch, *args)  # where the batch is to blame, this says so
            self._fall_back(reason_of(error))
            return result
        if self.donate:
            mark_donated(state, "a compiled step")
        if isinstance(self.step, TrainStep):
            check(self.step.transform, new.params, metrics)
        return new, metrics

    @property
    def transform(self) -> Any:
        """That of the step; what makes its state."""
        return cast(Any, self.step).transform

    @property
    def recompiles(self) -> int:
        """How many graphs were compiled after the first, for new shapes of the batch or other changes that graphs guard."""
        return max(0, sum(graph.compilations for graph in self.graphs.by_shape.values()) - 1)

    def check(self, info: Metrics) -> None:
        """As the step's own `check`."""
        if isinstance(self.step, TrainStep):
            self.step.check(info)

    @property
    def traced(self) -> StepFn[Any]:
        """The step as a graph traces it: pure, and differentiated by `torch.func`."""
        if not isinstance(self.step, TrainStep):
            return self.step
        gradients = self.step.gradients
        if isinstance(gradients, ValueAndGrad):
            gradients = attrs.evolve(gradients, engine="func")
        return attrs.evolve(self.step, donate=False, gradients=gradients, on_gradients=None)

    def _graph(self, state: TrainState, batch: Batch, args: tuple[Any, ...]) -> Graph | None:
        graphs, binding = self.graphs, self._binding
        leaves, structure = optree.tree_flatten(cast(Any, (batch, *args)))
        modes = () if binding is None else tuple([child.training for child in binding.modules])
        key = (self.donate, modes, structure, tuple([_shape(leaf) for leaf in leaves]))
        graph = graphs.by_shape.get(key)
        if graph is not None or graphs.eager:
            return graph
        if binding is not None and binding.has_hooks():
            self._fall_back("A parameter has a hook on its gradient, which a graph would not run.")
            return None
        if len(graphs.by_shape) >= MAX_GRAPHS:
            graphs.eager = True
            _warn(
                f"This step has been compiled for {MAX_GRAPHS} different shapes of the batch and runs eagerly on further ones. "
                "Pad batches to a few lengths (pad_to_multiple_of in Hugging Face's collators) and drop the short last one."
            )
            return None
        if isinstance(self.step, TrainStep) and not graphs.by_shape:
            # finds what is wrong with the loss or the batch, and settles what models decide in their first forward pass
            self.step.gradients(state, batch, *args)
        among = getattr(getattr(self.step, "gradients", None), "among", None)
        rank = 0 if among is None else among.rank
        graph = graph_of(self.traced, donate=self.donate, backend=self.backend, options=self.options, rank=rank)
        graphs.by_shape[key] = graph
        return graph

    @property
    def _binding(self) -> Binding | None:
        return self.step.gradients.binding if isinstance(self.step, TrainStep) else None

    def _train_mode(self) -> AbstractContextManager[None]:
        # flags of modules must be set outside the graph
        binding = self._binding
        return nullcontext() if binding is None or binding.module.training else binding.mode(training=True)

    def _eager(self) -> StepFn[Any]:
        return attrs.evolve(self.step, donate=self.donate) if isinstance(self.step, TrainStep) else self.step

    def _fall_back(self, reason: str) -> None:
        self.graphs.eager = True
        self.graphs.by_shape.clear()
        _warn(f"This step cannot be compiled as one graph and runs eagerly from now on. {reason}")


def compile(step: StepFn[Any], *, donate: bool | None = None, backend: str = "inductor", **options: Any) -> CompiledStep:
    """Compile a whole step (loss, gradients, accumulation, transform) as one graph.

    The step is compiled when it first sees a batch of a given shape. Where that cannot be done (no C++ compiler, code
    that breaks the graph) it warns once, with the reason, and runs eagerly. Randomness is seeded once a step: a step
    replays bit for bit, but draws other dropout masks than the eager step.

    Args:
        step: what `train_step` made, or any function `(state, batch) -> (state, metrics)` composed of `value_and_grad`
            with engine="func" and `apply_gradients`.
        donate: reuse the storage of the state that is given; that of `step` where None.
        backend: as for `torch.compile`.
        options: further arguments of `torch.compile`, such as `mode`.

    Returns:
        The compiled step. Its `recompiles` counts the graphs made after the first.

    Raises:
        ArgumentError: an option that the whole-step graph fixes (`fullgraph`, `dynamic`) is given.

    >>> import fts, torch
    >>> from fts import steps, transforms as tx
    >>> step = steps.train_step(lambda params, batch: (params["w"] * batch).sum(), tx.sgd(0.1))
    >>> state = fts.TrainState.create({"w": torch.tensor([1.0])}, tx.sgd(0.1))
    >>> state, metrics = compile(step, backend="eager")(state, torch.tensor([2.0]))
    >>> state.params["w"]
    tensor([0.8000])
    """
    for name in ("fullgraph", "dynamic"):
        if name in options:
            raise ArgumentError(f"compile({name}=...) is fixed: a step is one whole graph for each shape of the batch.")
    if isinstance(step, CompiledStep):
        step = step.step
    if isinstance(step, TrainStep) and isinstance(step.gradients, ManualBackward):
        raise ArgumentError(
            f"{step.gradients.label} cannot be compiled: a graph of the whole step cannot follow a backward of its own. "
            "Return the loss instead (steps.train_step), or do not compile."
        )
    if isinstance(step, TrainStep) and isinstance(step.gradients, FiniteGradients):
        raise ArgumentError(IN_GRAPH)
    if not callable(step):
        raise ArgumentError(f"compile needs a step (state, batch) -> (state, metrics), not {type(step).__name__}.")
    return CompiledStep(step, bool(getattr(step, "donate", False)) if donate is None else donate, backend, options)


def _shape(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return (leaf.shape, leaf.dtype.str) if hasattr(leaf, "shape") else leaf


def _warn(message: str) -> None:
    warnings.warn(message, CompileFallbackWarning, stacklevel=4)
