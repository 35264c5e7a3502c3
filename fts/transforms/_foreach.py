"""Elementwise rules on lists of tensors: which of torch's `_foreach_*` kernels to call, and what each may overwrite.

A rule is traced once. `c * y` that is added becomes `alpha=` of the addition, products become addcmul and addcdiv, and every
result is written where nothing is needed any more: new moments over the old, and the rest over the gradients.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from fts.transforms._scalars import scale_
from fts.transforms._tracing import UNARY, Graph, Scalars, Value, trace

Tensors: TypeAlias = list[Tensor]

_COMMUTATIVE = frozenset({"add", "maximum", "minimum", "mul"})


@attrs.frozen
class Call:
    """One kernel call: `function(*lists, *numbers)`; it writes the first list or, with `new`, returns another."""

    function: Callable[..., Any]
    target: str
    lists: tuple[str, ...]
    scalars: tuple[int, ...]
    new: bool = False


@attrs.frozen
class Plan:
    """A rule as kernel calls on lists by name.

    Attributes:
        calls: in order.
        scalars: the numbers that they take.
        update: the name of the list that has the updates in the end.
    """

    calls: tuple[Call, ...]
    scalars: Scalars
    update: str

    def run(self, lists: Mapping[str, Tensors], numbers: Mapping[str, Any]) -> Tensors:
        """Compute the updates; the lists of state fields get their new values, and the gradients are overwritten."""
        found: dict[str, Any] = dict(lists)
        values = self.scalars.values(numbers)
        for call in self.calls:
            result = call.function(*[found[name] for name in call.lists], *[values[index] for index in call.scalars])
            if call.new:
                found[call.target] = list(result)
        return found[self.update]  # type: ignore[no-any-return]


def make_plan(rule: Callable[..., Any], fields: Sequence[str], label: str) -> Plan:
    """Trace an elementwise rule and choose its kernels.

    Args:
        rule: a function of `grad`, `param`, per-parameter state fields and scalars, by these names.
        fields: the per-parameter fields, in the order in which the rule returns their new values.
        label: the transform's, for messages.

    Raises:
        ArgumentError: the rule cannot be traced, or is not elementwise.
    """
    graph = trace(rule, {"grad", "param", *fields}, label)
    fused = _fuse(graph, fields)
    orders = [list(_in_order(fused.outputs)), list(_in_order(_recorded(graph, fused)))]
    plans = [_Writer(fused, fields).write(order) for order in orders]
    return min(plans, key=lambda plan: sum(1 + call.new for call in plan.calls))


# which kernels -----------------------------------------------------------------------------------------------------------------
