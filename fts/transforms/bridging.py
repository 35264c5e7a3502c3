"""Any torch.optim.Optimizer as a transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import attrs
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fts.errors import ArgumentError
from fts.transforms._arguments import check_transform, in_words, need_params
from fts.transforms._leaves import Tree, encode, settled
from fts.transforms._optimizers import (
    Bound,
    Kept,
    Numbers,
    bind,
    build,
    changing,
    check_constants,
    constants,
    is_optimizer,
    isolate,
    lent,
    needs_closure,
    picked,
    place,
    read,
    release,
    snapshot,
    without_hooks,
)
from fts.transforms._rates import rate_now, report
from fts.transforms._scalars import device_of
from fts.typing import Info, Number, OptState, Params, Schedule, Transform

Groups: TypeAlias = Sequence[Mapping[str, Any]] | Callable[[list[str]], Sequence[Mapping[str, Any]]]
"""Parameter groups by name: `[{"params": names, "lr": 0.1, ...}, ...]`, or a function of all names that makes them."""

Closure: TypeAlias = Callable[[Params], tuple[Tensor, Params]]
"""`params -> (loss, grads)`, as `torch.func.grad_and_value` turned round."""

_TRIAL_STEPS = 2
_TRIAL_GRADIENT = 1e-3


class TorchState(NamedTuple):
    """State of `from_torch`: what the optimizer keeps, its Python numbers as 0-d tensors.

    Attributes:
        step: 0-d int64 tensor on the CPU: the number of updates so far. At 0 the other tensors are without meaning.
        params: the optimizer's state of each parameter, by name.
        groups: of each group, the values that the optimizer's steps change.
        attributes: those of the optimizer's own attributes that its steps change.
        common: its state that belongs to no parameter.
    """

    step: Tensor
    params: dict[str, Tree]
    groups: tuple[dict[str, Tree], ...]
    attributes: dict[str, Tree]
    common: dict[str, Tree]


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
    states = _states(opt_state)
    if len(states) != len(bridges):
        raise ArgumentError(
            f"eval_params: {transform.label} contains from_torch {len(bridges)} times, and the state {len(states)} times. "
            "Pass the state that belongs to the transform."
        )
    for bridge, state in zip(bridges, states, strict=True):
        result |= bridge.at_evaluation(state, params)
    return result


@attrs.frozen(eq=False)
class Bridge:
    """A torch optimizer and how to make one; its methods are the functions of the transform.

    Attributes:
        label: of the transform.
        make: makes an optimizer on the memory of parameters, or binds the given one.
        own: whether the optimizer was given; else `make` makes new ones.
        modes: whether the optimizer may distinguish training from evaluation.
        rates: the first `lr` of each group of a given optimizer.
        schedule: a factor on them.
        closure: evaluates the loss for the optimizer.
    """

    label: str
    make: Callable[[Params], Bound]
    own: bool
    modes: bool
    rates: list[Any] | None
    schedule: Schedule | None
    closure: Closure | None
    _made: dict[Any, Bound] = attrs.field(factory=dict)

    def init(self, params: Params) -> TorchState:
        """Learn from steps on copies what the optimizer will keep."""
        self._check_place()
        weights = {name: tensor.detach().clone() for name, tensor in params.items()}
        grads = _small(weights)
        bound = self._bound(weights, new=True)
        names = list(weights)
        with _same_randomness(params), without_hooks(bound.optimizer), torch.no_grad(), lent(bound, weights, grads):
            before = snapshot(bound)
            isolate(bound)
            self._set_rates(bound, 1.0)
            _train_mode(bound.optimizer)
            trial = None if self.closure is None else _on_trial
            _step(bound, weights, trial)
            first, between = read(bound, names, Numbers.none(bound)), snapshot(bound)
            for name, grad in _small(weights).items():
                grads[name].copy_(grad)
            _step(bound, weights, trial)
            numbers = changing(bound, before, self._fixed).union(changing(bound, between, self._fixed))
            second = read(bound, names, numbers)
        once = picked(between.groups, between.attributes, numbers)
        first = first._replace(**{key: encode(value, key) for key, value in once.items()})
        title = type(bound.optimizer).__name__
        kept = Kept(*[settled(one, two, f"{title}'s {key}") for key, one, two in zip(Kept._fields, first, second, strict=True)])
        zeros = pytree.tree_map(Tensor.zero_, _separated(kept, [*weights.values(), *grads.values(), *params.values()]))
        return TorchState(torch.zeros((), dtype=torch.int64), *zeros)

    def update(self, grads: Params, state: TorchState, params: Params | None) -> tuple[Params, OptState, Info]:
        """One step on copies."""
        params = need_params(params, self.label)
        self._check_place()
        self._check_derivative(params, grads)
        with torch.no_grad():
            copies = _copies(params)
            after, state, info = self._run(_copies(grads), pytree.tree_map(Tensor.clone, state), copies)
            return {name: after[name].sub_(params[name]) for name in grads}, state, info

    def apply(self, grads: Params, state: TorchState, params: Params) -> tuple[Params, OptState, Info]:
        """One step in place."""
        self._check_place()
        self._check_derivative(params, grads)
        with torch.no_grad():
            return self._run(grads, state, params)

    def at_evaluation(self, state: TorchState, params: Params) -> Params:
        """The parameters of this optimizer as it wants them evaluated."""
        inside = {name: params[name].detach().clone() for name in state.params if name in params}
        if not int(state.step) or not inside:
            return {}
        bound = self._bound(inside, new=False)
        if not _has_modes(bound.optimizer):
            return {}
        with torch.no_grad(), lent(bound, inside, {}):
            place(bound, Kept(*pytree.tree_map(Tensor.clone, state)[1:]))
            bound.optimizer.eval()
            return {name: bound.parameters[name].data if name in bound.parameters else tensor for name, tensor in inside.items()}

    def _run(self, grads: Params, state: TorchState, params: Params) -> tuple[Params, TorchState, Info]:
        count, kept = int(state.step), Kept(*state[1:])
        factor = None if self.schedule is None else float(rate_now(self.schedule, state.step))
        bound = self._bound(params, new=count == 0)
        optimizer = bound.optimizer
        numbers = Numbers(tuple(map(frozenset, kept.groups)), frozenset(kept.attributes))
        with lent(bound, params, grads):
            if len(optimizer.param_groups) != len(kept.groups):
                raise ArgumentError(
                    f"{self.label}: the state is of {len(kept.groups)} parameter groups, the optimizer has "
                    f"{len(optimizer.param_groups)}. Create the state anew after add_param_group."
                )
            if count:
                place(bound, kept)
            else:
                isolate(bound)
            self._set_rates(bound, factor)
            _train_mode(optimizer)
            info = _info(optimizer, params)
            fixed = constants(bound, numbers, self._fixed)
            _step(bound, params, self.closure)
            check_constants(fixed, constants(bound, numbers, self._fixed), type(optimizer).__name__)
            after = read(bound, list(params), numbers, kept)
            for name, tensor in params.items():
                if name in bound.parameters and bound.parameters[name].data_ptr() != tensor.data_ptr():
                    tensor.copy_(bound.parameters[name].data)  # the optimizer put another tensor there
        after = _separated(after, [*params.values(), *grads.values()], kept)
        return params, TorchState(state.step.add_(1), *after), info

    def _bound(self, params: Params, *, new: bool) -> Bound:
        """The optimizer for these parameters; a new one, on their memory, or one that waits to be lent."""
        if self.own:
            bound = self.make(params)
            if not bound.parameters.keys() & params.keys():
                raise ArgumentError(
                    f"{self.label}: the optimizer holds none of the trained parameters. Its names are "
                    f"{list(bound.parameters)[:5]}, those of the state {list(params)[:5]}. Pass parameters= with those."
                )
            return bound
        if new:
            return self.make(params)
        key = tuple([(name, p.shape, p.dtype, p.device) for name, p in params.items()])
        if key not in self._made:
            self._made[key] = release(self.make(params))
        return self._made[key]

    @property
    def _fixed(self) -> frozenset[str]:
        return frozenset() if self.schedule is None else frozenset({"lr"})

    def _set_rates(self, bound: Bound, factor: float | None) -> None:
        if self.schedule is None or factor is None:
            return
        groups = bound.optimizer.param_groups
        rates = [group.get("lr") for group in groups] if self.rates is None else self.rates
        for group, rate in zip(groups, rates, strict=True):
            if rate is None:
                raise ArgumentError(
                    f"{self.label}: the schedule is a factor on lr, and a group of the optimizer has none. Set lr."
                )
            group["lr"] = rate * factor

    def _check_place(self) -> None:
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
            raise ArgumentError(
                f"{self.label} runs a torch optimizer, which cannot be traced or transformed: not in a graph (steps.compile then "
                "warns and runs eagerly), nor in torch.vmap or torch.func. Use one of fts's own transforms there, such as adamw."
            )

    def _check_derivative(self, params: Params, grads: Params) -> None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tree in (params, grads) for tensor in tree.values()):
            raise ArgumentError(
                f"{self.label} cannot be differentiated, and parameters or gradients require a gradient. Call it under "
                "torch.no_grad(), or use one of fts's own transforms."
            )


def _bridge(
    optimizer: Any,
    groups: Groups | None,
    parameters: Mapping[str, nn.Parameter] | None,
    schedule: Schedule | None,
    closure: Closure | None,
    kwargs: dict[str, Any],
) -> Bridge:
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
        make, name, options = partial(build, optimizer, groups, kwargs), in_words(getattr(optimizer, "func", optimizer)), kwargs
    else:
        raise ArgumentError(
            f"from_torch takes an optimizer, a class of optimizers, or a function that makes one, not {optimizer!r}."
        )
    words = [f"{key}={in_words(value)}" for key, value in options.items()]
    words += [] if schedule is None else [f"schedule={in_words(schedule)}"]
    label = f"from_torch({', '.join([name, *words])})"
    if closure is None and needs_closure(optimizer):
        raise ArgumentError(
            f"{label}: this optimizer evaluates the loss in its step. Pass closure=, a function params -> (loss, grads)."
        )
    modes = _has_modes(optimizer) or not (own or isinstance(optimizer, type))  # of a function, the result is not known yet
    return Bridge(label, make, own, modes, rates, schedule, closure)


def _step(bound: Bound, params: Params, closure: Closure | None) -> None:
    """Let the optimizer step, in place."""
    if closure is None:
        if needs_closure(bound.optimizer):
            raise ArgumentError(
                f"from_torch: {type(bound.optimizer).__name__} evaluates the loss in its step. Pass closure=, a function "
                "params -> (loss, grads)."
            )
        bound.optimizer.step()
        return

    def evaluate() -> Tensor:
        loss, grads = closure({**params, **{name: bound.parameters[name].data for name in params if name in bound.parameters}})
        for name in params:
            if name not in grads:
                raise ArgumentError(f"from_torch: the closure returned no gradient for {name!r}.")
            if name in bound.parameters:
                bound.parameters[name].grad = grads[name].detach().clone()
        return loss.detach()

    bound.optimizer.step(evaluate)


def _on_trial(params: Params) -> tuple[Tensor, Params]:
    return torch.zeros(()), _small(params)


def _small(params: Params) -> Params:
    return {name: torch.full_like(tensor, _TRIAL_GRADIENT) for name, tensor in params.items()}


def _copies(tensors: Params) -> Params:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _has_modes(optimizer: Any) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def _train_mode(optimizer: Any) -> None:
    if _has_modes(optimizer):
        optimizer.train()


def _info(optimizer: Any, params: Params) -> Info:
    rate: Number | None = optimizer.param_groups[0].get("lr")
    if rate is None:
        return {}
    device = device_of(params)
    return {"lr": report(rate, device).clone() if isinstance(rate, Tensor) else report(rate, device)}


def _separated(kept: Kept, others: list[Tensor], before: Kept | None = None) -> Kept:
    """The same tree, in which no tensor shares memory with another or with `others`."""
    old = {id(leaf) for leaf in pytree.tree_leaves(before)}
    leaves, structure = pytree.tree_flatten(kept)
    if all(id(leaf) in old for leaf in leaves):
        return kept
    taken = {_memory(tensor) for tensor in others} | {_memory(leaf) for leaf in leaves if id(leaf) in old}
    for i, leaf in enumerate(leaves):
        if id(leaf) not in old:
            leaves[i] = leaf.clone() if leaf.numel() and _memory(leaf) in taken else leaf
            taken.add(_memory(leaves[i]))
    separated: Kept = pytree.tree_unflatten(leaves, structure)
    return separated


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_randomness(params: Params) -> Any:
    """Leave the generators as they were: trial steps of an optimizer may draw from them."""
    indices = {tensor.device.index for tensor in params.values() if tensor.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(index for index in indices if index is not None))


def _bridges(transform: Transform) -> list[Bridge]:
    owner = getattr(transform.init, "__self__", None)
    if isinstance(owner, Bridge):
        return [owner]
    return [bridge for child in transform.children for bridge in _bridges(child)]


def _states(tree: OptState) -> list[TorchState]:
    if isinstance(tree, TorchState):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [state for child in children for state in _states(child)]
