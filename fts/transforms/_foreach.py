"""Elementwise rules on lists of tensors: which of torch's `_foreach_*` kernels to call, and what each may overwrite.

A rule is traced once. In an addition `c * y` becomes `alpha=`, and a product or quotient becomes addcmul or addcdiv. Every
result is written where nothing is needed any more: new moments over the old ones, and the rest over the gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fts.transforms._foreach_kernels import COMMUTATIVE, IN_PLACE, NEW, clone
from fts.transforms._tracing import Graph, Scalars, Value, trace

Tensors: TypeAlias = list[Tensor]


class Call(NamedTuple):
    """A kernel call, `function(*lists, *numbers)`: it writes the first list or, with `new`, returns one as `target`."""

    function: Callable[..., Any]
    target: str
    lists: tuple[str, ...]
    scalars: tuple[int, ...] = ()
    new: bool = False


class KernelPlan:
    """A rule as kernel calls on named lists.

    Attributes:
        source: the calls in Python, one a line.
        scalars: the numbers that they take, `_s[0]` and on.
        cost: kernels, and lists that they allocate.
    """

    def __init__(self, calls: Sequence[Call], scalars: Scalars, inputs: Sequence[str], update: str) -> None:
        lines = [f"def run(_s, {', '.join(inputs)}):"]
        kernels: dict[str, Any] = {}
        for call in calls:
            name = f"_{getattr(call.function, '__name__', 'call').strip('_')}_{len(kernels)}"
            kernels[name] = call.function
            line = f"{name}({', '.join((*call.lists, *(f'_s[{index}]' for index in call.scalars)))})"
            lines.append(f"    {call.target} = list({line})" if call.new else f"    {line}")
        lines.append(f"    return {update}")
        self.source, self.scalars = "\n".join(lines), scalars
        self.cost = sum(1 + call.new for call in calls)
        exec(compile(self.source, "<rule on lists>", "exec"), kernels)
        self._run = kernels["run"]

    def run(self, lists: Mapping[str, Tensors], numbers: Mapping[str, Any]) -> Tensors:
        """The updates. The lists of state fields get their new values, and the gradients are overwritten."""
        return self._run(self.scalars.values(numbers), **lists)  # type: ignore[no-any-return]


def make_kernel_plan(rule: Callable[..., Any], fields: Sequence[str], label: str) -> KernelPlan:
    """Trace an elementwise rule and choose its kernels.

    Args:
        rule: a function of `grad`, `param`, per-parameter state fields and numbers, by these names.
        fields: the per-parameter fields, in the order in which the rule returns their new values.
        label: the transform's, for messages.

    Raises:
        ArgumentError: the rule cannot be traced, or is not elementwise.
    """
    graph = trace(rule, {"grad", "param", *fields}, label)
    homes = _fuse(graph, fields)
    needed = _needed(graph.outputs)
    as_written = sorted(needed, key=lambda value: value.order)
    plans = [_Writer(graph, fields, homes).write(order) for order in (as_written, needed)]
    return min(plans, key=lambda plan: plan.cost)


def _needed(outputs: Iterable[Value]) -> list[Value]:
    """All values that outputs are made of, each after its arguments."""
    found: dict[Value, None] = {}

    def visit(value: Value) -> None:
        if value not in found:
            for arg in value.args:
                visit(arg)
            found[value] = None

    for output in outputs:
        visit(output)
    return list(found)


def _fuse(graph: Graph, fields: Sequence[str]) -> dict[Value, str]:
    """Take scaled terms and products into the additions that use them.

    Returns:
        The state field over which a value should be written, for the new values of fields and what only these are made of.
    """
    values = _needed(graph.outputs)
    uses = Counter(arg for value in values for arg in value.args) + Counter(graph.outputs)
    users: dict[Value, list[Value]] = {}
    for value in values:
        for arg in value.args:
            users.setdefault(arg, []).append(value)
    homes: dict[Value, str] = {}

    def assign(value: Value, field: str) -> None:
        homes.setdefault(value, field)
        for arg in value.args:
            if uses[arg] == 1 and arg.op != "input":
                assign(arg, field)

    for field, output in zip(fields, graph.outputs[1:], strict=True):
        assign(output, field)

    def decays(term: Value, total: Value) -> bool:
        """Whether a term is a state field that can be scaled in place, because the sum becomes its new value."""
        moment = term.args[0]
        others = [user for user in users[moment] if user is not term]
        is_field = moment.op == "input" and homes.get(total) == moment.detail
        return is_field and all(user.order < total.order for user in others) and moment not in graph.outputs

    for value in values:
        if value.op == "sqrt" and value.args[0].op == "debias" and uses[value.args[0]] == 1:
            inner = value.args[0]
            root = Value("sqrt", inner.args, order=inner.order)
            value.op, value.args = "times", (root,)
            value.scalars = (graph.scalars.compute(_root, *inner.scalars),)
            uses[root] = 1
        elif value.op in ("add", "sub") and value.args[0] is not value.args[1]:
            pairs = [value.args, value.args[::-1]] if value.op == "add" else [value.args]
            for start, term in pairs:
                product = _as_product(term, uses, graph.scalars) if uses[term] == 1 else None
                if product is None or (product[0] == "add_scaled" and decays(term, value)):
                    continue
                op, factors, scalar = product
                scalar = graph.scalars.compute(_negative, scalar) if value.op == "sub" else scalar
                value.op, value.args, value.scalars = op, (start, *factors), (scalar,)
                break
    return homes


def _as_product(term: Value, uses: Counter[Value], scalars: Scalars) -> tuple[str, tuple[Value, ...], int] | None:
    """A term as a kernel that adds it: of `c * y`, `c * y * z` or `c * y / z`."""
    if term.op == "scale":
        (inner,) = term.args
        if inner.op in ("mul", "div") and uses[inner] == 1:
            return "addcmul" if inner.op == "mul" else "addcdiv", inner.args, term.scalars[0]
        return "add_scaled", (inner,), term.scalars[0]
    if term.op not in ("mul", "div"):
        return None
    op = "addcmul" if term.op == "mul" else "addcdiv"
    for i, factor in enumerate(term.args[: 2 if term.op == "mul" else 1]):
        if factor.op == "scale" and uses[factor] == 1:
            factors = list(term.args)
            factors[i] = factor.args[0]
            return op, tuple(factors), factor.scalars[0]
    return op, term.args, scalars.constant(1)


def _root(factor: Any) -> Any:
    return factor**0.5


def _negative(factor: Any) -> Any:
    return -factor


class _Writer:
    """Writes a plan for values in a given order, and keeps account of what each list has in it."""

    def __init__(self, graph: Graph, fields: Sequence[str], homes: Mapping[Value, str]) -> None:
        self.graph, self.fields, self.homes = graph, fields, homes
        self.calls: list[Call] = []
        self.place: dict[Value, str] = {value: name for name, value in graph.inputs.items()}
        self.left: Counter[Value] = Counter(graph.outputs)  # uses to come; outputs are needed in the end
        self.free: list[str] = []
        self.made = 0
        # the gradients are given also to a rule that does not read them: their memory takes the updates
        self.inputs = tuple(dict.fromkeys(("grad", *fields, *graph.inputs)))

    def write(self, order: Sequence[Value]) -> KernelPlan:
        self.left.update(arg for value in order for arg in value.args)
        if not self.left[self.graph.inputs.get("grad", Value("input"))]:
            self.free.append("grad")
        for value in order:
            if value.op != "input":
                self._compute(value)
        update = self._finish()
        return KernelPlan(self.calls, self.graph.scalars, self.inputs, update)

    def _compute(self, value: Value) -> None:
        self.left.subtract(value.args)
        if value.op == "call":
            target = self._new()
            self._call(value.detail.on_lists, value, value.args, target, new=True)
        else:
            args = self._arranged(value)
            written = self._target(value, args)
            if written is None:
                target = self._new()
                self._call(NEW[value.op], value, args, target, new=True)
            else:
                target = written
                if self.place[args[0]] != target:
                    self.calls.append(Call(torch._foreach_copy_, target, (target, self.place[args[0]])))
                self._call(IN_PLACE[value.op], value, args, target)
        self.place[value] = target
        for arg in dict.fromkeys(value.args):
            name = self.place[arg]
            if self._is_spare(arg, name) and name != target and name not in self.free:
                self.free.append(name)

    def _call(self, function: Callable[..., Any], value: Value, args: Sequence[Value], target: str, *, new: bool = False) -> None:
        lists = [self.place[arg] for arg in args]
        self.calls.append(Call(function, target, tuple(lists if new else [target, *lists[1:]]), value.scalars, new))

    def _arranged(self, value: Value) -> tuple[Value, ...]:
        """The arguments, with one that can be written over in front where their order does not matter."""
        if value.op in COMMUTATIVE and self._may_overwrite(value.args[1], value):
            first_is_home = self.place[value.args[0]] == self.homes.get(value)
            if not self._may_overwrite(value.args[0], value) or (
                self.place[value.args[1]] == self.homes.get(value) and not first_is_home
            ):
                return value.args[::-1]
        return value.args

    def _target(self, value: Value, args: Sequence[Value]) -> str | None:
        """The list that a result is written in; None for a new one."""
        if self._may_overwrite(args[0], value):
            return self.place[args[0]]
        home = self.homes.get(value)
        taken = [other for other, name in self.place.items() if name == home and (self.left[other] > 0 or other in args)]
        if home is not None and not taken:
            return home
        return self.free.pop() if self.free else None

    def _may_overwrite(self, arg: Value, value: Value) -> bool:
        name = self.place[arg]
        if self.left[arg] > 0 or not _is_float(arg):
            return False
        return name == self.homes.get(value) if name in self.fields else name != "param"

    def _is_spare(self, arg: Value, name: str) -> bool:
        return self.left[arg] == 0 and name != "param" and name not in self.fields and _is_float(arg)

    def _new(self) -> str:
        self.made += 1
        return f"_new{self.made}"

    def _finish(self) -> str:
        """Move the new values of the fields to their places; the updates get memory of their own."""
        update = self.place[self.graph.outputs[0]]
        if update in self.fields or update == "param":
            target = self.free.pop() if self.free else self._new()
            in_place = not target.startswith("_new") or any(call.target == target for call in self.calls)
            self.calls.append(
                Call(torch._foreach_copy_, target, (target, update)) if in_place else Call(clone, target, (update,), new=True)
            )
            update = target
        sources = {field: self.place[value] for field, value in zip(self.fields, self.graph.outputs[1:], strict=True)}
        moves = {field: source for field, source in sources.items() if field != source}
        while moves:
            field = next((field for field in moves if field not in moves.values()), None)
            if field is None:  # two fields change places
                field, copy = next(iter(moves)), self._new()
                self.calls.append(Call(clone, copy, (field,), new=True))
                moves = {key: copy if source == field else source for key, source in moves.items()}
            self.calls.append(Call(torch._foreach_copy_, field, (field, moves.pop(field))))
        return update


def _is_float(value: Value) -> bool:
    """Whether a list has the gradients' dtype, as far as is known: comparisons have not."""
    return value.op != "call" or getattr(value.detail.target, "__name__", value.detail.target) == "where"
