"""A composed step as a tree of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from fts.steps.batch_context import WithFullBatch
from fts.steps.compiled_step import CompiledStep
from fts.steps.eval_step import EvalStep
from fts.steps.gradients import ValueAndGrad
from fts.steps.losses import ModuleLoss, function_name
from fts.steps.manual_backward import ManualBackward
from fts.steps.nonfinite import CheckedGradients
from fts.steps.train_step import TrainStep
from fts.typing import Transform

Node: TypeAlias = tuple[str, list[Any]]


def describe(step: Any) -> str:
    """Describe the parts of a step, a transform or a loss.

    Args:
        step: a step of `fts.steps`, a Transform, a module loss, or any function.

    Returns:
        A tree of text, one part per line.

    >>> from fts import steps, transforms as tx
    >>> optimizer = tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(0.1))
    >>> print(describe(steps.train_step(lambda params, batch: params["w"].sum(), optimizer, accumulate=4)))
    train_step
    ├── gradients: module engine, accumulate x4
    │   └── loss: <lambda>
    └── chain
        ├── clip_by_global_norm(1.0)
        └── sgd(lr=0.1)
    """
    label, children = _node(step)
    return "\n".join([label, *_branches(children)])


def _branches(children: list[Any]) -> list[str]:
    lines = []
    for index, child in enumerate(children):
        last = index == len(children) - 1
        label, below = child if isinstance(child, tuple) and not isinstance(child, Transform) else _node(child)
        lines.append(("└── " if last else "├── ") + label)
        lines += [("    " if last else "│   ") + line for line in _branches(below)]
    return lines


def _node(part: Any) -> Node:
    for kind, node in _NODES.items():
        if isinstance(part, kind):
            return node(part)
    return _name(part), []


def _gradients_node(part: ValueAndGrad) -> Node:
    accumulate = f", accumulate x{part.accumulate}" if part.accumulate > 1 else ""
    label = f"gradients: {part.engine} engine{accumulate}{_precision(part.precision)}"
    return label, [("loss: " + _name(part.forward.loss), [])]


def _donation(part: Any) -> str:
    return ", donates" if part.donate else ""


def _name(part: Any) -> str:
    return part.label if isinstance(part, ModuleLoss) else function_name(part)


def _precision(precision: str | None) -> str:
    return f", {precision}" if precision else ""


_NODES: dict[type, Callable[[Any], Node]] = {
    TrainStep: lambda part: ("train_step" + _donation(part), [part.gradient_fn, part.transform]),
    CompiledStep: lambda part: (f"compiled to one graph, {part.backend}{_donation(part)}", [part.traced]),
    EvalStep: lambda part: ("eval_step" + _precision(part.precision), [("loss: " + _name(part.forward.loss), [])]),
    WithFullBatch: lambda part: (f"with_full_batch: {function_name(part.fn)}(batch) goes to the loss", [part.step]),
    ValueAndGrad: _gradients_node,
    CheckedGradients: lambda part: ("gradients that must be finite", [part.gradient_fn]),
    ManualBackward: lambda part: ("gradients: " + part.label, []),
    Transform: lambda part: (part.label, list(part.children)),
}
