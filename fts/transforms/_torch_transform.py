"""A torch optimizer that runs on the tensors of a training state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import attrs
import optree
import torch
from torch import Tensor

from fts.dtensors import any_dtensor, local_storage_ptr, mesh_and_placements
from fts.errors import ArgumentError
from fts.transforms._checks import need_params
from fts.transforms._dtensor_mode import dtensor_mode
from fts.transforms._learning_rates import rate_now, report
from fts.transforms._scalars import device_of
from fts.transforms._tensor_trees import Tree, common_structure, encode
from fts.transforms._torch_binding import (
    Bound,
    Kept,
    Numbers,
    changing,
    check_constants,
    constants,
    has_modes,
    isolate,
    needs_closure,
    picked,
    place,
    read,
    release,
    snapshot,
    swap_tensors,
    without_hooks,
)
from fts.typing import Info, Number, OptState, Params, Schedule

Closure: TypeAlias = Callable[[Params], tuple[Tensor, Params]]
"""`params -> (loss, grads)`, as `torch.func.grad_and_value` turned round."""

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


@attrs.frozen(eq=False)
class TorchTransform:
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
        with _same_randomness(params), without_hooks(bound.optimizer), torch.no_grad(), swap_tensors(bound, weights, grads):
            before = snapshot(bound)
            isolate(bound)
            self._set_rates(bound, 1.0)
            _train_mode(bound.optimizer)
            trial = None if self.closure is None else _on_trial
            self._try(bound, weights, trial)
            first, between = read(bound, names, Numbers.none(bound)), snapshot(bound)
            for name, grad in _small(weights).items():
                grads[name].copy_(grad)
            self._try(bound, weights, trial)
            numbers = changing(bound, before, self._fixed).union(changing(bound, between, self._fixed))
            second = read(bound, names, numbers)
        once = picked(between.groups, between.attributes, numbers)
        first = first._replace(**{key: encode(value, key) for key, value in once.items()})
        title = type(bound.optimizer).__name__
        kept = Kept(
            *[common_structure(one, two, f"{title}'s {key}") for key, one, two in zip(Kept._fields, first, second, strict=True)]
        )
        kept = _separated(kept, [*weights.values(), *grads.values(), *params.values()])
        for leaf in _leaves(kept):
            leaf.zero_()
        return TorchState(torch.zeros((), dtype=torch.int64), *kept)

    def _try(self, bound: Bound, weights: Params, closure: Closure | None) -> None:
        """A step on copies, where an optimizer that is not made for tensors of several processes says so."""
        try:
            _step(bound, weights, closure)
        except RuntimeError as error:
            if not any_dtensor(weights.values()):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ArgumentError(
                f"{self.label}: {type(bound.optimizer).__name__} cannot step on sharded parameters "
                f"({reason}). Take one that can, such as adamw, sgd, or from_torch with AdamW, RMSprop, Adagrad or Adafactor, "
                "or keep full parameters on each rank, as DDP does."
            ) from error

    def update(self, grads: Params, state: TorchState, params: Params | None) -> tuple[Params, OptState, Info]:
        """One step on copies."""
        params = need_params(params, self.label)
        self._check_place()
        self._check_derivative(params, grads)
        with torch.no_grad():
            copies = _copies(params)
            after, state, info = self._run(_copies(grads), _cloned(state), copies)
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
        if not has_modes(bound.optimizer):
            return {}
        with torch.no_grad(), swap_tensors(bound, inside, {}):
            place(bound, Kept(*_cloned(state)[1:]))
            bound.optimizer.eval()
            return {name: bound.parameters[name].data if name in bound.parameters else tensor for name, tensor in inside.items()}

    def _run(self, grads: Params, state: TorchState, params: Params) -> tuple[Params, TorchState, Info]:
        count, kept = int(state.step), Kept(*state[1:])
        factor = None if self.schedule is None else float(rate_now(self.schedule, state.step))
        bound = self._bound(params, new=count == 0)
        optimizer = bound.optimizer
        numbers = Numbers(tuple(map(frozenset, kept.groups)), frozenset(kept.attributes))
        with swap_tensors(bound, params, grads):
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
                if name in bound.parameters and local_storage_ptr(bound.parameters[name]) != local_storage_ptr(tensor):
                    tensor.copy_(bound.parameters[name].data)  # the optimizer put another tensor there
        after = _separated(after, [*params.values(), *grads.values()], kept)
        return params, TorchState(state.step.add_(1), *after), info

    def _bound(self, params: Params, *, new: bool) -> Bound:
        """The optimizer for these parameters; a new one, on their memory, or one that is kept for later updates."""
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
        key = tuple([(name, p.shape, p.dtype, p.device, mesh_and_placements(p)) for name, p in params.items()])
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


def _step(bound: Bound, params: Params, closure: Closure | None) -> None:
    """Let the optimizer step, in place."""
    if closure is None:
        if needs_closure(bound.optimizer):
            raise ArgumentError(
                f"from_torch: {type(bound.optimizer).__name__} evaluates the loss in its step. Pass closure=, a function "
                "params -> (loss, grads)."
            )
        with dtensor_mode(params):
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

    with dtensor_mode(params):
        bound.optimizer.step(evaluate)


def _on_trial(params: Params) -> tuple[Tensor, Params]:
    return torch.zeros(()), _small(params)


def _small(params: Params) -> Params:
    return {name: torch.full_like(tensor, _TRIAL_GRADIENT) for name, tensor in params.items()}


def _copies(tensors: Params) -> Params:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _train_mode(optimizer: Any) -> None:
    if has_modes(optimizer):
        optimizer.train()


def _info(optimizer: Any, params: Params) -> Info:
    rate: Number | None = optimizer.param_groups[0].get("lr")
    if rate is None:
        return {}
    device = device_of(params)
    return {"lr": report(rate, device).clone() if isinstance(rate, Tensor) else report(rate, device)}


def _separated(kept: Kept, others: list[Tensor], before: Kept | None = None) -> Kept:
    """The same tree, in which no tensor shares memory with another or with `others`."""
    old = set() if before is None else set(map(id, _leaves(before)))
    leaves, structure = optree.tree_flatten(cast(Any, kept))
    if all(id(leaf) in old for leaf in leaves):
        return kept
    taken = {local_storage_ptr(tensor) for tensor in others} | {local_storage_ptr(leaf) for leaf in leaves if id(leaf) in old}
    for i, leaf in enumerate(leaves):
        if id(leaf) not in old:
            leaves[i] = leaf.clone() if leaf.numel() and local_storage_ptr(leaf) in taken else leaf
            taken.add(local_storage_ptr(leaves[i]))
    return cast(Kept, optree.tree_unflatten(structure, leaves))


def _cloned(state: TorchState) -> TorchState:
    return cast(TorchState, optree.tree_map(Tensor.clone, cast(Any, state)))


def _leaves(kept: Kept) -> list[Tensor]:
    return optree.tree_leaves(cast(Any, kept))


def _same_randomness(params: Params) -> Any:
    """Leave the generators as they were: trial steps of an optimizer may draw from them."""
    indices = {tensor.device.index for tensor in params.values() if tensor.device.type == "cuda"}
    return torch.random.fork_rng(devices=sorted(index for index in indices if index is not None))
