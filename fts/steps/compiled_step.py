"""A step compiled as one graph: loss, gradients, transform and new state."""

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
from fts.steps.gradients import ValueAndGrad
from fts.steps.manual_backward import ManualBackward
from fts.steps.module_binding import ModuleBinding
from fts.steps.nonfinite import CHECK_IN_GRAPH, CheckedGradients
from fts.steps.step_graph import StepGraph, compile_error_reason, compile_graph, is_compile_error
from fts.steps.train_step import TrainStep
from fts.steps.updates import check_info
from fts.typing import Batch, Metrics, StepFn

MAX_GRAPHS = 16
"""The number of batch shapes that one step is compiled for; others run eagerly."""


@attrs.define(eq=False)
class GraphCache:
    """The graphs that a step has been compiled to, by batch shape; shared with its donating variant."""

    by_shape: dict[Hashable, StepGraph] = attrs.field(factory=dict)
    eager: bool = False


@attrs.frozen(eq=False)
class CompiledStep:
    """A step that runs as one graph; made by `compile`."""

    step: StepFn[Any]
    donate: bool
    backend: str
    options: dict[str, Any]
    graphs: GraphCache = attrs.field(factory=GraphCache)

    def __call__(self, state: TrainState, batch: Batch, *args: Any) -> tuple[TrainState, Metrics]:
        if isinstance(batch, Mapping):
            # also Hugging Face's BatchEncoding, which is no registered pytree; dynamo guards the order of keys
            batch = {key: batch[key] for key in sorted(batch, key=str)}
        graph = self._graph(state, batch, args)
        if graph is None:
            return self._eager()(state, batch, *args)
        try:
            with self._train_mode():
                new, metrics = graph(state, batch, *args)
        except BaseException as error:
            if not is_compile_error(error):
                if self.donate and graph.uses_rng is not None:  # the graph may have been interrupted while it wrote
                    mark_donated(state, "a compiled step, which failed")
                raise
            result = self._eager()(state, batch, *args)  # raises a clear error if the batch is at fault
            self._fall_back(compile_error_reason(error))
            return result
        if self.donate:
            mark_donated(state, "a compiled step")
        if isinstance(self.step, TrainStep):
            check_info(self.step.transform, new.params, metrics)
        return new, metrics

    @property
    def transform(self) -> Any:
        """The transform of the step, which its state is created with."""
        return cast(Any, self.step).transform

    @property
    def recompiles(self) -> int:
        """The number of graphs compiled after the first, for new batch shapes or other changes that graphs guard."""
        return max(0, sum(graph.compilations for graph in self.graphs.by_shape.values()) - 1)

    def check(self, info: Metrics) -> None:
        """Call the `check` of the step, if it has one."""
        if isinstance(self.step, TrainStep):
            self.step.check(info)

    @property
    def traced(self) -> StepFn[Any]:
        """The step as it is traced: pure, and differentiated by `torch.func`."""
        if not isinstance(self.step, TrainStep):
            return self.step
        gradients = self.step.gradient_fn
        if isinstance(gradients, ValueAndGrad):
            gradients = attrs.evolve(gradients, engine="func")
        return attrs.evolve(self.step, donate=False, gradient_fn=gradients, gradient_callback=None)

    def _graph(self, state: TrainState, batch: Batch, args: tuple[Any, ...]) -> StepGraph | None:
        graphs, binding = self.graphs, self._binding
        leaves, structure = optree.tree_flatten(cast(Any, (batch, *args)))
        modes = () if binding is None else tuple([child.training for child in binding.modules])
        key = (self.donate, modes, structure, tuple([_shape(leaf) for leaf in leaves]))
        graph = graphs.by_shape.get(key)
        if graph is not None or graphs.eager:
            return graph
        if binding is not None and binding.has_gradient_hooks():
            self._fall_back("A parameter has a gradient hook, which a graph would not run.")
            return None
        if len(graphs.by_shape) >= MAX_GRAPHS:
            graphs.eager = True
            _warn(
                f"This step has been compiled for {MAX_GRAPHS} different shapes of the batch and runs eagerly on further ones. "
                "Pad batches to a few lengths (pad_to_multiple_of in Hugging Face's collators) and drop the short last one."
            )
            return None
        if isinstance(self.step, TrainStep) and not graphs.by_shape:
            # raises errors of the loss or the batch eagerly, and runs what models initialize in their first forward pass
            self.step.gradient_fn(state, batch, *args)
        collectives = getattr(getattr(self.step, "gradient_fn", None), "collectives", None)
        rank = 0 if collectives is None else collectives.rank
        graph = compile_graph(self.traced, donate=self.donate, backend=self.backend, options=self.options, rank=rank)
        graphs.by_shape[key] = graph
        return graph

    @property
    def _binding(self) -> ModuleBinding | None:
        return self.step.gradient_fn.binding if isinstance(self.step, TrainStep) else None

    def _train_mode(self) -> AbstractContextManager[None]:
        # training flags must be set outside the graph
        binding = self._binding
        return nullcontext() if binding is None or binding.module.training else binding.training_mode(training=True)

    def _eager(self) -> StepFn[Any]:
        return attrs.evolve(self.step, donate=self.donate) if isinstance(self.step, TrainStep) else self.step

    def _fall_back(self, reason: str) -> None:
        self.graphs.eager = True
        self.graphs.by_shape.clear()
        _warn(f"This step cannot be compiled as one graph and runs eagerly from now on. {reason}")


def compile(step: StepFn[Any], *, donate: bool | None = None, backend: str = "inductor", **options: Any) -> CompiledStep:
    """Compile a step (loss, gradients, accumulation, transform) as one graph.

    The step is compiled at its first batch of each shape. If that fails (no C++ compiler, a graph break) it warns once,
    with the reason, and runs eagerly. Generators are seeded once per step: a step replays bit for bit, but has other
    dropout masks than the eager step.

    Args:
        step: from `train_step`, or any function `(state, batch) -> (state, metrics)` composed of `value_and_grad`
            with engine="func" and `apply_gradients`.
        donate: reuse the storage of the input state; None takes the setting of `step`.
        backend: as for `torch.compile`.
        options: further arguments of `torch.compile`, such as `mode`.

    Returns:
        The compiled step. Its `recompiles` counts the graphs compiled after the first.

    Raises:
        ArgumentError: an option that `compile` sets itself (`fullgraph`, `dynamic`) is given.

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
            raise ArgumentError(f"compile({name}=...) is set by fts: a step is one full graph for each batch shape.")
    if isinstance(step, CompiledStep):
        step = step.step
    if isinstance(step, TrainStep) and isinstance(step.gradient_fn, ManualBackward):
        raise ArgumentError(
            f"{step.gradient_fn.label} cannot be compiled: a graph of the full step cannot contain its backward calls. "
            "Return the loss instead (steps.train_step), or do not compile."
        )
    if isinstance(step, TrainStep) and isinstance(step.gradient_fn, CheckedGradients):
        raise ArgumentError(CHECK_IN_GRAPH)
    if not callable(step):
        raise ArgumentError(f"compile needs a step (state, batch) -> (state, metrics), not {type(step).__name__}.")
    return CompiledStep(step, bool(getattr(step, "donate", False)) if donate is None else donate, backend, options)


def _shape(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return (leaf.shape, leaf.dtype.str) if hasattr(leaf, "shape") else leaf


def _warn(message: str) -> None:
    warnings.warn(message, CompileFallbackWarning, stacklevel=4)
