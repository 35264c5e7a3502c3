"""Transforms from a rule for one tensor, as the paper writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from fts.dtensors import any_dtensor, full_tensor, local_tensors, redistribute
from fts.errors import ArgumentError
from fts.transforms._checks import need_params
from fts.transforms._foreach import KernelPlan, make_kernel_plan
from fts.transforms._scalars import as_scalar, device_of, new_count, readable, real, recorded, times
from fts.typing import Info, OptState, Params, Transform

Rule: TypeAlias = Callable[..., Any]
"""`(grad, ...) -> update` or `(update, *new)`: arguments by name, results in the order of the state's fields."""

Init: TypeAlias = Mapping[str, Callable[[Tensor], Tensor] | float | None]
"""How fields of a state begin: a function of the parameter, a number for all parameters together, or None for an empty one."""

Shared: TypeAlias = Callable[[Params, Any, Params | None], Mapping[str, Any]]
"""`(grads, state, params) -> numbers by name`, once per update."""

_FACTORS = "_bias_corrections"


def elementwise(
    rule: Rule,
    state: type[Any] | None = None,
    *,
    label: str,
    init: Init | None = None,
    shared: Shared | None = None,
    report: tuple[str, ...] = (),
    check: Callable[[Info], None] | None = None,
) -> Transform:
    """Make a transform from a rule that treats every number of a tensor alike.

    The rule is a plain function. It gets what its arguments name: `grad`, `param`, `step` (1 in the first update), a field
    of the state, or a number that `shared` returns. It returns the update and then the new values of the per-parameter
    fields, in their order; without such fields, the update alone.

    `update` calls the rule for each tensor. The fast path runs the same formula on lists of tensors with torch's
    `_foreach_*` kernels, over local shards, and in place: the rule is traced once for that, so it must not branch on values
    (use `torch.where`).

    Args:
        rule: the formula.
        state: a NamedTuple class: `step`, if the rule or a schedule needs it, and per-parameter fields, which begin at
            zero. None for a transform without state.
        label: as `describe` prints it.
        init: the fields that begin otherwise: a function of the parameter, a number (then the field is one 0-d tensor for all
            parameters), or None (then it stays empty, and the rule has nothing to do with it).
        shared: `(grads, state, params) -> dict` of numbers or 0-d tensors, once per update: those that are fields of the
            state are its new values. `state.step` is then the number of earlier updates, as schedules take it.
        report: which of those numbers the transform reports.
        check: `check(info)`: raises if training must not continue.

    Returns:
        A transform with `state`.

    Raises:
        ArgumentError: the rule has an argument that is none of these; or (in the fast path) it cannot be traced, or an
            operation in it is not elementwise.

    >>> from typing import NamedTuple
    >>> from fts.typing import Params
    >>> class LionState(NamedTuple):
    ...     mu: Params
    >>> def scale_by_lion(b1=0.9, b2=0.99):
    ...     def rule(grad, mu):
    ...         return (b1 * mu + (1 - b1) * grad).sign(), b2 * mu + (1 - b2) * grad
    ...
    ...     return elementwise(rule, LionState, label=f"scale_by_lion(b1={b1}, b2={b2})")
    >>> lion, grads = scale_by_lion(), {"w": torch.tensor([0.5, -3.0])}
    >>> lion.update(grads, lion.init(grads), None)[0]
    {'w': tensor([ 1., -1.])}
    """
    made = _Rule(rule, state, label, init, shared, report)
    return Transform(made.init, made.update, update_=made.update_, check=check, label=label)


def per_tensor(
    rule: Rule,
    state: type[Any] | None = None,
    *,
    label: str,
    init: Init | None = None,
    shared: Shared | None = None,
    report: tuple[str, ...] = (),
    check: Callable[[Info], None] | None = None,
) -> Transform:
    """Make a transform from any rule for one tensor: with norms, factors, matrix products, or branches on the shape.

    As `elementwise`, but the rule always runs on full tensors, one by one: a sharded one is gathered on all ranks before,
    and the results are sharded again. Fields of the state may have any shape.

    Args:
        rule: the formula.
        state: as in `elementwise`.
        label: as `describe` prints it.
        init: as in `elementwise`.
        shared: as in `elementwise`.
        report: as in `elementwise`.
        check: as in `elementwise`.

    Returns:
        A transform with `state`.

    Raises:
        ArgumentError: the rule has an argument that is none of those in `elementwise`.

    >>> normalize = per_tensor(lambda grad: grad / grad.norm(), label="normalize()")
    >>> normalize.update({"w": torch.tensor([3.0, 4.0])}, (), None)[0]
    {'w': tensor([0.6000, 0.8000])}
    """
    made = _Rule(rule, state, label, init, shared, report)
    made.on_full_tensors = True
    return Transform(made.init, made.update, check=check, label=label)


def bias_correction(moment: Tensor, decay: float, step: Any) -> Tensor:
    """A running mean that began at zero, divided by the sum of its weights, `1 - decay**step`.

    Args:
        moment: `decay * moment + (1 - decay) * value` so far.
        decay: in [0, 1).
        step: how many values entered: a number or 0-d tensor.

    Returns:
        A tensor in the dtype of `moment`.

    >>> bias_correction(torch.tensor([0.1]), 0.9, 1)
    tensor([1.])

    Source: Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", section 3.
    """
    if isinstance(moment, fx.Proxy):
        return recorded(bias_correction, moment, decay, step)
    factors = getattr(step, _FACTORS, {})
    if decay not in factors:
        factors[decay] = 1 / (1 - decay**step)
    return times(moment, factors[decay])


class _Rule:
    """A rule with all that it is given; its methods are the functions of the transform. A plain class, which dynamo can trace."""

    def __init__(
        self,
        rule: Rule,
        state: type[Any] | None,
        label: str,
        init: Init | None,
        shared: Shared | None,
        report: tuple[str, ...],
    ) -> None:
        self.rule, self.state, self.label, self.initial = rule, state, label, {} if init is None else init
        self.shared, self.report = shared, report
        self.on_full_tensors = False
        self.plan: KernelPlan | None = None  # the rule on lists, once it is traced
        self.wanted = _arguments(rule, label)
        self.name, self.needs_params = label.split("(", maxsplit=1)[0], "param" in self.wanted
        fields = () if state is None else state._fields
        numbers, moments = [], []
        for field in fields:
            begin = self.initial.get(field, torch.zeros_like)
            if field == "step" or isinstance(begin, (int, float)):
                numbers.append(field)
            elif begin is not None:
                moments.append(field)
        # fields that are one number for all parameters, and those that are a tensor for each
        self.numbers, self.moments = tuple(numbers), tuple(moments)
        unknown = [name for name in self.wanted if name not in ("grad", "param", *numbers, *moments)]
        if unknown and shared is None:
            raise ArgumentError(
                f"{label}: the rule has an argument {unknown[0]!r}. It may have "
                f"{', '.join(('grad', 'param', *numbers, *moments))}, and what shared= returns."
            )

    def init(self, params: Params) -> OptState:
        """The state before the first update."""
        return () if self.state is None else self.state(*[self._first(field, params) for field in self.state._fields])

    def _first(self, field: str, params: Params) -> Any:
        begin = self.initial.get(field, torch.zeros_like)
        if field == "step":
            return new_count(params)
        if field in self.numbers:
            return as_scalar(begin, device_of(params))
        values: Params = {}
        if callable(begin):
            for name, param in params.items():
                start = param.detach() if isinstance(param, nn.Parameter) else param
                value = begin(start)
                values[name] = value.clone() if value is start else value
        return values

    def update(self, grads: Params, state: Any, params: Params | None) -> tuple[Params, OptState, Info]:
        """The pure update: the rule for each tensor."""
        weights = self._weights(params)
        numbers = {field: getattr(state, field) for field in self.numbers}
        count = None
        if "step" in numbers:
            count = state.step + 1
            numbers["step"] = _shared_step(count)
        if self.shared is not None:
            numbers = {**numbers, **self.shared(grads, state, params)}
        columns: list[Mapping[str, Any]] = []
        for key in self.wanted:
            if key == "grad":
                columns.append(grads)
            elif key == "param" and weights is not None:
                columns.append(weights)
            else:
                columns.append(getattr(state, key) if key in self.moments else dict.fromkeys(grads, numbers[key]))
        results = self._results(grads, columns)
        for tensors, like in zip(results, (grads, *[getattr(state, field) for field in self.moments]), strict=True):
            for name, tensor in tensors.items():
                if self.on_full_tensors:
                    tensors[name] = redistribute(tensor.to(like[name].dtype), like[name])
                elif tensor.ndim == 0:  # a 0-d number widens no tensor but a 0-d one
                    tensors[name] = tensor.to(like[name].dtype)
        return results[0], self._next(state, count, numbers, results[1:]), self._info(numbers, grads)

    def _results(self, grads: Params, columns: Sequence[Mapping[str, Any]]) -> list[Params]:
        """What the rule returns for each parameter: the updates, then the new values of each field."""
        if self.on_full_tensors:
            found = {name: self.rule(*[full_tensor(column[name]) for column in columns]) for name in grads}
        else:
            found = {name: self.rule(*[column[name] for column in columns]) for name in grads}
        outputs = 1 + len(self.moments)
        for result in found.values():
            count = len(result) if isinstance(result, (tuple, list)) else 0
            if count != outputs and (count or outputs > 1):
                names = ", ".join(("update", *self.moments))
                raise ArgumentError(f"{self.label}: the rule must return ({names}), not {result!r:.80}.")
            if not count:
                return [found]
        return [{name: result[i] for name, result in found.items()} for i in range(outputs)]

    def _next(self, state: Any, count: Tensor | None, numbers: Mapping[str, Any], moments: Sequence[Params]) -> OptState:
        if self.state is None:
            return state
        found: dict[str, Any] = dict(zip(self.moments, moments, strict=True))
        for field in self.numbers:
            found[field] = count if field == "step" else as_scalar(numbers[field], getattr(state, field).device)
        return self.state(*[found.get(field, {}) for field in self.state._fields])

    def update_(self, grads: Params, state: Any, params: Params | None) -> tuple[Params, OptState, Info]:
        """The same on lists, over the gradients and the state."""
        weights = self._weights(params)
        numbers = {field: getattr(state, field) for field in self.numbers}
        new: Mapping[str, Any] = {}
        if self.shared is not None:
            seen = state._replace(step=readable(state.step)) if "step" in numbers else state
            new = self.shared(grads, seen, params)
            numbers.update(new)
        info = self._info(numbers, grads)
        # read first: some may be tensors of the state, which is written next
        numbers = {key: _read(value) for key, value in numbers.items()}
        for field in self.numbers:
            if field == "step":
                numbers[field] = _read(real(state.step.add_(1)))
            elif field in new:
                getattr(state, field).copy_(torch.as_tensor(new[field]))
        if not grads:
            return grads, state, info
        if self.plan is None:
            self.plan = make_kernel_plan(self.rule, self.moments, self.label)
        lists = {"grad": local_tensors(grads.values())}
        for field in self.moments:
            moments = getattr(state, field)
            lists[field] = local_tensors([moments[name] for name in grads])
        if weights is not None:
            lists["param"] = local_tensors([weights[name] for name in grads])
        updates = self.plan.run(lists, numbers)
        if updates is lists["grad"]:
            return grads, state, info
        if any_dtensor(grads.values()):
            torch._foreach_copy_(lists["grad"], updates)
            return grads, state, info
        return dict(zip(grads, updates, strict=True)), state, info

    def _weights(self, params: Params | None) -> Params | None:
        return need_params(params, self.name) if self.needs_params else None

    def _info(self, numbers: Mapping[str, Any], grads: Params) -> Info:
        if not self.report:
            return {}
        device = device_of(grads)
        values = {key: numbers[key] for key in self.report}
        # copies, because the state's may be overwritten in a later step
        return {
            key: as_scalar(value.detach().clone() if isinstance(value, Tensor) else value, device)
            for key, value in values.items()
        }


def _arguments(rule: Rule, label: str) -> tuple[str, ...]:
    if not hasattr(rule, "__code__"):
        raise ArgumentError(f"{label}: a rule is a plain Python function, not {rule!r}.")
    code = rule.__code__
    return tuple(code.co_varnames[: code.co_argcount])


def _read(value: Any) -> Any:
    """A number that later writes do not change: a Python number where reading one waits for nothing."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.is_cpu else value.clone()


def _shared_step(count: Tensor) -> Tensor:
    """The step as rules get it in a pure update: real, and with space for what many tensors need of it."""
    step: Tensor = real(count)
    if not torch.compiler.is_compiling():
        setattr(step, _FACTORS, {})
    return step
