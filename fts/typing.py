"""The types and protocols of all packages.

LossFn      (params or model, batch) -> loss, with an optional weight and metrics
Schedule    step -> value
Transform   init(params) -> state;  update(grads, state, params) -> (updates, state, info)
StepFn      (state, batch) -> (state, metrics)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Tensors by parameter name. Gradients and updates are dictionaries of the same names."""

OptState: TypeAlias = Any
"""A transform's state: a tensor, or tuples, NamedTuples and dicts of tensors. Never Python numbers."""

Info: TypeAlias = dict[str, Tensor]
"""The report of a transform about one update: a flat dictionary of 0-d tensors."""

Metrics: TypeAlias = dict[str, Tensor]
"""The metrics of a step: a flat dictionary of 0-d tensors on the device."""

Batch: TypeAlias = Any
"""Any tree (dict, tuple, list, dataclass) of tensors and other values."""

Number: TypeAlias = float | Tensor


class Schedule(Protocol):
    """A pure function from the number of applied updates to a value.

    It takes and returns a Python number in an eager step, and a 0-d tensor inside a graph, where the step counter is no
    constant.
    """

    def __call__(self, step: Any, /) -> Any: ...


class Transform(NamedTuple):
    """A pure mapping of gradients to updates, with its own state.

    Attributes:
        init: `init(params) -> state`.
        update: `update(grads, state, params) -> (updates, state, info)`. Pure: it does not write its inputs,
            and can be differentiated, vmapped and traced. The new parameters are `params + updates`.
        apply: `apply(grads, state, params) -> (params, state, info)`, or None. The fast path: it may overwrite
            all its arguments, and its result equals that of `update` to rounding.
        update_: like `update`, but it may overwrite `grads` and `state` (never `params`), or None.
        check: `check(info)`, or None. Reads the info of an update, and raises if training must stop.
        label: a description, for `describe`.
        children: the transforms that it is composed of, for `describe`.

    A transform is a pair of functions; the other attributes are optional:

    >>> import torch
    >>> from fts.typing import Transform
    >>> sign = Transform(lambda params: (), lambda grads, state, params: ({k: -g.sign() for k, g in grads.items()}, state, {}))
    >>> updates, state, info = sign.update({"w": torch.tensor([3.0, -4.0])}, (), None)
    >>> updates["w"]
    tensor([-1.,  1.])
    """

    init: Callable[[Params], OptState]
    update: Callable[[Params, OptState, Params | None], tuple[Params, OptState, Info]]
    apply: Callable[[Params, OptState, Params], tuple[Params, OptState, Info]] | None = None
    update_: Callable[[Params, OptState, Params | None], tuple[Params, OptState, Info]] | None = None
    check: Callable[[Info], None] | None = None
    label: str = "transform"
    children: tuple[Any, ...] = ()


class LossOutput(NamedTuple):
    """The result of a loss function: a mean loss, its weight, and further metrics.

    Attributes:
        loss: 0-d tensor, a mean over examples (or tokens).
        weight: the number of examples (or tokens) that the mean is over, a number or 0-d tensor; by default the batch size.
        metrics: 0-d tensors by name, each a mean over the same examples as the loss, or a pair (mean, weight).
    """

    loss: Tensor
    weight: Number | None = None
    metrics: Mapping[str, Any] = {}


class LossFn(Protocol):
    """A loss: `(params, batch)` for a plain function, `(model, batch)` inside `steps.module_loss`.

    Further arguments of the step are passed on: `step(state, batch, teacher)` calls `(model, batch, teacher)`.
    It returns a 0-d tensor, or `(loss, weight)`, `(loss, metrics)`, `(loss, weight, metrics)`, a `LossOutput`,
    or an output object with `.loss`.
    """

    def __call__(self, params: Any, batch: Any, /) -> Any: ...


State = TypeVar("State")


class StepFn(Protocol[State]):
    """One step of training: `(state, batch) -> (state, metrics)`."""

    def __call__(self, state: State, batch: Any, /) -> tuple[State, Metrics]: ...
