"""An elementwise rule as a graph: the operations on lists of tensors and on scalars that it is made of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from itertools import count
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from fts.errors import ArgumentError

UNARY = frozenset({
    "abs", "acos", "asin", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "expm1", "floor", "frac", "lgamma", "log",
    "log10", "log1p", "log2", "neg", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "tan", "tanh",
    "trunc",
})  # fmt: skip
"""Functions of one tensor that have a kernel on lists."""

_NAMES = {operator.truediv: "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "clip": "clamp"}
_OPTIONS = {"clamp": ("min", "max"), "lerp": ("weight",), "addcmul": ("value",), "addcdiv": ("value",)}
_CONSTANT = frozenset({"ones_like", "zeros_like"})


@attrs.define(eq=False)
class Value:
    """A list of tensors in a rule.

    Attributes:
        op: the operation that makes it, "input", or "call" for one without a kernel on lists.
        args: the lists that it is made of.
        scalars: the numbers that it is made of, as indices into the rule's scalars.
        detail: of an input its name, of a call the function of `args` and `scalars`.
        order: when the rule makes it.
    """

    op: str
    args: tuple[Value, ...] = ()
    scalars: tuple[int, ...] = ()
    detail: Any = None
    order: int = attrs.field(factory=count().__next__)


@attrs.define
class Scalars:
    """The numbers of a rule by index: constants, inputs, and those that are computed from these in each update."""

    constants: list[Any] = attrs.field(factory=list)
    inputs: dict[str, int] = attrs.field(factory=dict)
    computed: list[tuple[int, Callable[..., Any], tuple[int, ...]]] = attrs.field(factory=list)

    def constant(self, value: Any) -> int:
        """The index of a new constant."""
        self.constants.append(value)
        return len(self.constants) - 1

    def compute(self, function: Callable[..., Any], *args: int) -> int:
        """The index of a function of other numbers."""
        known = [self.constants[arg] for arg in args]
        if all(isinstance(value, (int, float)) for value in known):
            return self.constant(_evaluate(function, known))
        index = self.constant(None)
        self.computed.append((index, function, args))
        return index

    def values(self, given: Mapping[str, Any]) -> list[Any]:
        """All numbers in one update."""
        if not self.inputs and not self.computed:
            return self.constants
        values = self.constants.copy()
        for name, index in self.inputs.items():
            values[index] = given[name]
        for index, function, args in self.computed:
            values[index] = _evaluate(function, [values[arg] for arg in args])
        return values


@attrs.frozen
class Graph:
    """A traced rule: its inputs by name, its scalars, and its outputs, of which the first is the update."""

    inputs: dict[str, Value]
    scalars: Scalars
    outputs: list[Value]


def trace(rule: Callable[..., Any], tensors: Collection[str], label: str) -> Graph:
    """The graph of a rule.

    Args:
        rule: a function of tensors and numbers.
        tensors: the names of those arguments that are tensors.
        label: the transform's, for messages.

    Raises:
        ArgumentError: the rule branches on a value, or is not elementwise.
    """
    tracer = fx.Tracer()
    try:
        graph = tracer.trace(rule)
    except (TypeError, fx.proxy.TraceError) as error:
        raise ArgumentError(
            f"{label}: the rule cannot be traced ({error}). In an elementwise rule use torch.where instead of if, and "
            "torch.maximum instead of max; or make the transform with per_tensor."
        ) from error
    builder = _Builder(label)
    outputs: Any = ()
    for node in graph.nodes:
        if node.op == "output":
            outputs = node.args[0]
        elif node.op == "placeholder":
            builder.add_input(node, str(node.target), str(node.target) in tensors)
        elif node.op == "get_attr":
            builder.made[node] = builder.scalars.constant(getattr(tracer.root, str(node.target)))
        else:
            builder.add_operation(node)
    made = [builder.made.get(node) for node in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]
    values = [value for value in made if isinstance(value, Value)]
    if len(values) < len(made):
        raise ArgumentError(f"{label}: the rule returns something that is no tensor.")
    return Graph(builder.inputs, builder.scalars, values)


@attrs.define
class _Builder:
    """Takes the nodes of an fx graph one by one."""

    label: str
    inputs: dict[str, Value] = attrs.field(factory=dict)
    scalars: Scalars = attrs.field(factory=Scalars)
    made: dict[Any, Value | int] = attrs.field(factory=dict)

    def add_input(self, node: fx.Node, name: str, is_tensor: bool) -> None:
        if is_tensor:
            self.made[node] = self.inputs[name] = Value("input", detail=name)
        else:
            self.made[node] = self.scalars.inputs[name] = self.scalars.constant(None)

    def add_operation(self, node: fx.Node) -> None:
        name = _NAMES.get(node.target, node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))
        name = _NAMES.get(name, name)
        args = [self._operand(arg) for arg in node.args]
        options = {key: self._operand(arg) for key, arg in node.kwargs.items()}
        kinds = "".join("t" if isinstance(arg, Value) else "s" for arg in args)
        operands = [*args, *options.values()]
        function = _Call(node.target, kinds, tuple(options))
        if not any(isinstance(operand, Value) for operand in operands):
            self.made[node] = self.scalars.compute(function, *[operand for operand in operands if isinstance(operand, int)])
            return
        value = self._with_kernel(name, args, kinds, options)
        self.made[node] = self._call(name, function, operands) if value is None else value

    def _operand(self, arg: Any) -> Value | int:
        return self.made[arg] if isinstance(arg, fx.Node) else self.scalars.constant(arg)

    def _with_kernel(self, name: str, args: list[Any], kinds: str, options: dict[str, Any]) -> Value | None:
        """The value of an operation that has a kernel on lists, else None."""
        if name in _OPTIONS:
            return self._with_options(name, args, kinds, options)
        if options:
            return None
        squared = kinds == "ts" and name == "pow" and self.scalars.constants[args[1]] == 2
        if squared or (kinds == "t" and name == "square"):
            name, args, kinds = "mul", [args[0], args[0]], "tt"
        elif kinds == "st" and name == "sub":
            name, args, kinds = "add", [Value("neg", (args[1],)), args[0]], "ts"
        elif kinds == "st" and name in ("add", "mul"):
            args, kinds = args[::-1], "ts"
        elif kinds == "ts" and name == "sub":
            name, args = "add", [args[0], self.scalars.compute(operator.neg, args[1])]
        elif kinds == "tss" and name == "bias_correction":
            name, args, kinds = "debias", [args[0], self.scalars.compute(_bias_factor, *args[1:])], "ts"
        kernel = KERNELS.get((name, kinds))
        if kernel is None:
            return None
        return Value(kernel, tuple(args[: kinds.count("t")]), tuple(args[kinds.count("t") :]))

    def _with_options(self, name: str, args: list[Any], kinds: str, options: dict[str, Any]) -> Value | None:
        tensors = len(kinds) - len(kinds.lstrip("t"))
        given = dict(zip(_OPTIONS[name], args[tensors:], strict=False)) | options
        given = {key: arg for key, arg in given.items() if isinstance(arg, Value) or self.scalars.constants[arg] is not None}
        if any(isinstance(arg, Value) for arg in given.values()):
            return None
        if name == "clamp" and tensors == 1:
            value: Value = args[0]
            for key, bound in given.items():
                value = Value(f"clamp_{key}", (value,), (bound,))
            return value
        if name == "lerp" and tensors == 2 and given:
            return Value(name, tuple(args[:2]), (given["weight"],))
        if tensors == 3:
            return Value(name, tuple(args[:3]), (given["value"] if given else self.scalars.constant(1),))
        return None

    def _call(self, name: str, function: _Call, operands: list[Value | int]) -> Value:
        if not _is_elementwise(name):
            raise ArgumentError(
                f"{self.label}: the rule uses {name}, which does not treat every number of a tensor alike. Make the transform "
                "with per_tensor."
            )
        tensors = tuple(operand for operand in operands if isinstance(operand, Value))
        numbers = tuple(operand for operand in operands if isinstance(operand, int))
        return Value("call", tensors, numbers, attrs.evolve(function, kinds=_kinds(operands)))


KERNELS = (
    {(name, "t"): name for name in UNARY}
    | {(name, "tt"): name for name in ("add", "div", "maximum", "minimum", "mul", "sub")}
    | {(name, "ts"): name for name in ("clamp_max", "clamp_min", "debias", "pow", "times")}
    | {("add", "ts"): "add_scalar", ("div", "ts"): "div_scalar", ("mul", "ts"): "scale"}
)
"""Operations with a kernel on lists, by name and whether each argument is a tensor ("t") or a number ("s")."""


@attrs.frozen
class _Call:
    """A function or method, called with positional and named arguments in one row.

    Attributes:
        target: the function, or the name of the method.
        kinds: for each argument whether it is a tensor ("t") or not ("s").
        options: names of the last arguments.
    """

    target: Any
    kinds: str
    options: tuple[str, ...]

    def __call__(self, *operands: Any) -> Any:
        positional = len(operands) - len(self.options)
        options = dict(zip(self.options, operands[positional:], strict=True))
        if isinstance(self.target, str):
            return getattr(operands[0], self.target)(*operands[1:positional], **options)
        return self.target(*operands[:positional], **options)

    def on_lists(self, *operands: Any) -> list[Tensor]:
        """The function of each tensor of some lists, which come first, and of numbers."""
        lists, numbers = operands[: self.kinds.count("t")], operands[self.kinds.count("t") :]
        results = []
        for tensors in zip(*lists, strict=True):
            rest, scalars = iter(tensors), iter([_as_tensor(number, tensors[0].device) for number in numbers])
            result = self(*[next(rest) if kind == "t" else next(scalars) for kind in self.kinds])
            results.append(result.clone() if any(result is tensor for tensor in tensors) else result)
        return results


def _kinds(operands: list[Value | int]) -> str:
    return "".join("t" if isinstance(operand, Value) else "s" for operand in operands)


def _bias_factor(decay: Any, step: Any) -> Any:
    return 1 / (1 - decay**step)


def _evaluate(function: Callable[..., Any], args: list[Any]) -> Any:
    """A function of numbers: in Python where that gives a real number, else in 0-d tensors, as in a pure update."""
    try:
        value = function(*args)
    except (ArithmeticError, AttributeError, TypeError):
        value = None
    if value is not None and not isinstance(value, complex):
        return value
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), torch.device("cpu"))
    value = function(*[_as_tensor(arg, device) for arg in args])
    return value.item() if value.is_cpu else value


def _as_tensor(value: Any, device: torch.device) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full((), value, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    return torch.full((), value, device=device) if isinstance(value, bool) else value


@lru_cache(maxsize=256)
def _is_elementwise(name: str) -> bool:
    """By torch's own tags."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return name in _CONSTANT
    tagged = any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
    return tagged or name in _CONSTANT
