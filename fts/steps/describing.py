"""A composed step, printed as a tree."""

from __future__ import annotations

from typing import Any, TypeAlias

from fts.steps.backward import OwnBackward
from fts.steps.compiled import CompiledStep
from fts.steps.evaluate import EvalStep
from fts.steps.gradients import ValueAndGrad
from fts.steps.losses import ModuleLoss, name_of
from fts.steps.passing import Passing
from fts.steps.train import TrainStep
from fts.typing import Transform

Node: TypeAlias = tuple[str, list[Any]]


def describe(step: Any) -> str:
    """Print what a step, a transform or a loss is made of.

    Args:
        step: a step of `fts.steps`, a Transform, a module loss, or any function.

    Returns:
        A tree of text, one part a line.

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
    if isinstance(part, TrainStep):
        return "train_step" + (", donates" if part.donate else ""), [part.gradients, part.transform]
    if isinstance(part, CompiledStep):
        return f"compiled to one graph, {part.backend}" + (", donates" if part.donate else ""), [part.traced]
    if isinstance(part, EvalStep):
        return "eval_step" + _with_precision(part.precision), [("loss: " + _name(part.forward.loss), [])]
    if isinstance(part, ValueAndGrad):
        accumulate = f", accumulate x{part.accumulate}" if part.accumulate > 1 else ""
        label = f"gradients: {part.engine} engine{accumulate}{_with_precision(part.precision)}"
        return label, [("loss: " + _name(part.forward.loss), [])]
    if isinstance(part, Passing):
        return f"passing {name_of(part.fn)}(batch) to the loss", [part.step]
    if isinstance(part, OwnBackward):
        return "gradients: " + part.label, []
    if isinstance(part, Transform):
        return part.label, list(part.children)
    return _name(part), []


def _name(part: Any) -> str:
    return part.label if isinstance(part, ModuleLoss) else name_of(part)


def _with_precision(precision: str | None) -> str:
    return f", {precision}" if precision else ""
