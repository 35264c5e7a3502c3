"""Any torch.optim.Optimizer as a transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from fts.errors import ArgumentError
from fts.transforms._checks import check_transform, format_value
from fts.transforms._states import states_in
from fts.transforms._torch_binding import Bound, bind, build, has_modes, is_optimizer, needs_closure
from fts.transforms._torch_transform import Closure, TorchState, TorchTransform
from fts.typing import OptState, Params, Schedule, Transform

Groups: TypeAlias = Sequence[Mapping[str, Any]] | Callable[[list[str]], Sequence[Mapping[str, Any]]]
"""Parameter groups by name: `[{"params": names, "lr": 0.1, ...}, ...]`, or a function of all names that makes them."""


def from_torch(
    optimizer: Any,
    *,
    groups: Groups | None = None,
    parameters: Mapping[str, nn.Parameter] | None = None,
    schedule: Schedule | None = None,
    closure: Closure | None = None,
    **kwargs: Any,
) -> Transform:
    """Make a transform of a torch optimizer.

    It runs the optimizer's own `step`, so it works eagerly only: not in graphs, under `torch.vmap` or `torch.func`, and no
    derivative goes through it. `init` takes two steps on copies to learn what the optimizer keeps.

    Args:
        optimizer: a class or function `(param_groups, **kwargs) -> optimizer`; or an optimizer, whose options, and what a
            torch scheduler makes of its `lr`, are read at each update. Its own state and parameters stay as they are,
            unless the training state holds the parameters' own memory and is donated.
        groups: for a class or function: a list of `{"params": names, **options}` in which each parameter is named once, or
            a function from all names to such a list. One group where None.
        parameters: for an optimizer: its Parameters by name, `dict(model.named_parameters())`. Trained parameters that are
            not in its groups get updates of zero.
        schedule: a factor on each group's first `lr`, by the number of updates applied; without it `lr` is as it is.
        closure: `params -> (loss, grads)`, which an optimizer that evaluates the loss itself (LBFGS) calls in its step.
        kwargs: options for the class or function.

    Returns:
        A transform with `TorchState`. It reports `lr`, that of the first group, where there is one.

    Raises:
        ArgumentError: the arguments do not go together; or (in `init` and in updates) a parameter is in no group or in two,
            the optimizer keeps something that is no tensor or number, or the update runs in a graph or in `torch.func`.
        UnknownParameterError: (in `init`) a group names something that is no trained parameter.
        ScheduleError: (in an update) the schedule returned a negative factor or one that is not finite.

    >>> import torch
    >>> from fts import transforms as tx
    >>> descent = tx.from_torch(torch.optim.RMSprop, lr=0.1, groups=[{"params": ["w"]}, {"params": ["b"], "lr": 0.01}])
    >>> params = {"w": torch.tensor([1.0]), "b": torch.tensor([1.0])}
    >>> updates, state, info = descent.update({"w": torch.ones(1), "b": torch.ones(1)}, descent.init(params), params)
    >>> updates
    {'w': tensor([-1.0000]), 'b': tensor([-0.1000])}
    """
    bridge = _bridge(optimizer, groups, parameters, schedule, closure, kwargs)
    return Transform(bridge.init, bridge.update, bridge.apply, label=bridge.label)


def eval_params(transform: Transform, opt_state: OptState, params: Params) -> Params:
    """The parameters to evaluate and to save.

    They differ from those that are trained where `from_torch` has an optimizer with `train()` and `eval()` (schedule-free).

    Args:
        transform: may contain any number of `from_torch`, in `chain` and other wrappers.
        opt_state: its state.
        params: the trained parameters.

    Returns:
        A new dictionary. Parameters that do not differ are the given tensors; nothing is written.

    Raises:
        ArgumentError: the state is not one of the transform.

    >>> import torch
    >>> from fts import transforms as tx
    >>> params = {"w": torch.tensor([1.0])}
    >>> tx.eval_params(tx.sgd(0.1), tx.sgd(0.1).init(params), params)
    {'w': tensor([1.])}
    """
    check_transform("eval_params", transform)
    bridges = _bridges(transform)
    result = dict(params)
    if not any(bridge.modes for bridge in bridges):
        return result
    states = states_in(opt_state, TorchState)
    if len(states) != len(bridges):
        raise ArgumentError(
            f"eval_params: {transform.label} contains from_torch {len(bridges)} times, and the state {len(states)} times. "
            "Pass the state that belongs to the transform."
        )
    for bridge, state in zip(bridges, states, strict=True):
        result |= bridge.at_evaluation(state, params)
    return result


def _bridge(
    optimizer: Any,
    groups: Groups | None,
    parameters: Mapping[str, nn.Parameter] | None,
    schedule: Schedule | None,
    closure: Closure | None,
    kwargs: dict[str, Any],
) -> TorchTransform:
    if schedule is not None and not callable(schedule):
        raise ArgumentError(f"from_torch: schedule must be a function of the number of updates, not {schedule!r}.")
    own, rates = is_optimizer(optimizer), None
    make: Callable[[Params], Bound]
    if own:
        if parameters is None:
            raise ArgumentError(
                "from_torch needs the names of an optimizer's parameters: parameters=dict(model.named_parameters())."
            )
        if groups is not None or kwargs:
            given = ["groups"] * (groups is not None) + list(kwargs)
            raise ArgumentError(
                f"from_torch: {given} are for a class of optimizers; an optimizer has its groups and options already."
            )
        bound = bind(optimizer, parameters)
        make, name = (lambda params: bound), type(optimizer).__name__
        rates = [group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
        options = {"lr": rates[0]} if rates and rates[0] is not None else {}
    elif callable(optimizer):
        if parameters is not None:
            raise ArgumentError(
                "from_torch: parameters= is for an optimizer; a class of optimizers gets its parameters from the state."
            )
        make, name, options = (
            partial(build, optimizer, groups, kwargs),
            format_value(getattr(optimizer, "func", optimizer)),
            kwargs,
        )
    else:
        raise ArgumentError(
            f"from_torch takes an optimizer, a class of optimizers, or a function that makes one, not {optimizer!r}."
        )
    words = [f"{key}={format_value(value)}" for key, value in options.items()]
    words += [] if schedule is None else [f"schedule={format_value(schedule)}"]
    label = f"from_torch({', '.join([name, *words])})"
    if closure is None and needs_closure(optimizer):
        raise ArgumentError(
            f"{label}: this optimizer evaluates the loss in its step. Pass closure=, a function params -> (loss, grads)."
        )
    modes = has_modes(optimizer) or not (own or isinstance(optimizer, type))  # of a function, the result is not known yet
    return TorchTransform(label, make, own, modes, rates, schedule, closure)


def _bridges(transform: Transform) -> list[TorchTransform]:
    owner = getattr(transform.init, "__self__", None)
    if isinstance(owner, TorchTransform):
        return [owner]
    return [bridge for child in transform.children for bridge in _bridges(child)]
