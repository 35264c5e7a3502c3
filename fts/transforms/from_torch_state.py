"""From the state of torch's optimizers to that of a transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fts.dtensors import copy_into
from fts.errors import ArgumentError
from fts.transforms._states import states_in, with_states
from fts.transforms._tensor_trees import Tree, encode, fitted
from fts.transforms._torch_transform import TorchState
from fts.transforms.adam import AdamState
from fts.transforms.momentum import SgdState
from fts.transforms.plateau import FollowState
from fts.typing import OptState


def with_torch_moments(
    opt_state: OptState, moments: Mapping[str, Mapping[str, Any]], *, step: int, groups: Sequence[Mapping[str, Any]] = ()
) -> OptState:
    """The state of a transform with what a torch optimizer kept for each parameter; the inverse of `torch_moments`.

    Args:
        opt_state: a new state of a transform with `adam`, `adamw`, `sgd` or `from_torch` in it. It is not changed.
        moments: by name of a parameter, the entries of `torch.optim.Optimizer.state`. Adam's moments of a parameter that has none
            are 0, as before its first gradient.
        step: the number of updates so far, where the entries do not say.
        groups: the optimizer's groups, whose values `from_torch` may keep.

    Returns:
        A state of the same structure, shapes and dtypes.

    Raises:
        ArgumentError: the entries are those of another optimizer, or of parameters of other shapes.

    >>> from fts import transforms as tx
    >>> moments = {"w": {"step": torch.tensor(3.0), "exp_avg": torch.tensor([0.2]), "exp_avg_sq": torch.tensor([0.4])}}
    >>> with_torch_moments(tx.adamw(0.1).init({"w": torch.zeros(1)}), moments, step=3)
    AdamState(step=tensor(3), mu={'w': tensor([0.2000])}, nu={'w': tensor([0.4000])})
    """
    kinds: dict[type, Callable[[Any], OptState]] = {
        AdamState: lambda state: _adam(state, moments, step),
        SgdState: lambda state: _sgd(state, moments, step),
        TorchState: lambda state: _torch(state, moments, step, groups),
    }
    if not states_in(opt_state, *kinds):
        raise ArgumentError("with_torch_moments: the transform has neither adam, adamw, sgd nor from_torch in it.")
    return with_states(opt_state, kinds)


def _adam(state: AdamState, moments: Mapping[str, Mapping[str, Any]], step: int) -> AdamState:
    entries = {name: moments[name] for name in state.mu if moments.get(name)}
    for name, entry in entries.items():
        _check_keys(name, entry, {"step", "exp_avg", "exp_avg_sq"})
    steps = [int(entry["step"]) for entry in entries.values()]
    mu = {name: _like(form, entries.get(name, {}).get("exp_avg"), name) for name, form in state.mu.items()}
    nu = {name: _like(form, entries.get(name, {}).get("exp_avg_sq"), name) for name, form in state.nu.items()}
    return AdamState(torch.full_like(state.step, max(steps, default=step)), mu, nu)


def _sgd(state: SgdState, moments: Mapping[str, Mapping[str, Any]], step: int) -> SgdState:
    for name, entry in moments.items():
        _check_keys(name, entry, {"momentum_buffer"} if entry else set())
    buffers = {name: moments.get(name, {}).get("momentum_buffer") for name in state.trace}
    if step and any(buffer is None for buffer in buffers.values()):
        raise ArgumentError("with_torch_moments: there is no momentum_buffer for some parameters.")
    return SgdState(
        torch.full_like(state.step, step), {name: _like(form, buffers[name], name) for name, form in state.trace.items()}
    )


def _torch(
    state: TorchState, moments: Mapping[str, Mapping[str, Any]], step: int, groups: Sequence[Mapping[str, Any]]
) -> TorchState:
    if state.attributes or state.common:
        own = [*state.attributes, *state.common]
        raise ArgumentError(f"with_torch_moments: the optimizer keeps {own[:3]}, which its state_dict() does not have.")
    if len(groups) != len(state.groups):
        raise ArgumentError(f"with_torch_moments: there are {len(groups)} groups for an optimizer of {len(state.groups)}.")
    params = {}
    for name, form in state.params.items():
        entry = moments.get(name, {})
        _check_keys(name, entry, set(form))
        params[name] = {key: _tree(part, entry[key], f"{name}[{key!r}]") for key, part in form.items()}
    kept = tuple(
        {key: _tree(part, group.get(key), f"group {i}[{key!r}]") for key, part in form.items()}
        for i, (form, group) in enumerate(zip(state.groups, groups, strict=True))
    )
    return state._replace(step=torch.full_like(state.step, step), params=params, groups=kept)


def _tree(form: Tree, value: Any, where: str) -> Tree:
    if isinstance(form, Tensor) and isinstance(value, Tensor):
        return _like(form, value, where)
    return fitted(encode(value, where), form, where)


def _like(form: Tensor, value: Any, where: str) -> Tensor:
    """A copy of a tensor with the layout, dtype and device of `form`; zeros for None."""
    if value is None:
        return torch.zeros_like(form)
    if not isinstance(value, Tensor) or value.shape != form.shape:
        found = list(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ArgumentError(f"with_torch_moments: {where} has a moment of shape {found}; it must be {list(form.shape)}.")
    return copy_into(torch.empty_like(form), value)


def _check_keys(name: str, entry: Mapping[str, Any], wanted: set[str]) -> None:
    if set(entry) != wanted:
        raise ArgumentError(
            f"with_torch_moments: the optimizer kept {sorted(map(str, entry))} for {name!r}; this one keeps {sorted(wanted)}."
        )


def with_plateau(opt_state: OptState, rate: float, memory: Mapping[str, Any]) -> OptState:
    """The state of `reduce_on_plateau` with `Plateau`, with what torch's `ReduceLROnPlateau` knows.

    Args:
        opt_state: the state of a transform with `reduce_on_plateau` in it. It is not changed.
        rate: the learning rate of the next update.
        memory: has `best`, `num_bad_epochs` and `cooldown_counter`.

    Raises:
        ArgumentError: the rule of the state remembers other things.

    >>> from fts import transforms as tx
    >>> state = tx.reduce_on_plateau(tx.sgd, 0.1, tx.Plateau()).init({"w": torch.zeros(1)})
    >>> after = with_plateau(state, 0.05, {"best": 2.0, "num_bad_epochs": 3, "cooldown_counter": 0})
    >>> tx.followed_rate(after).item(), after.memory["bad"].item()
    (0.05, 3)
    """
    names = {"best": "best", "bad": "num_bad_epochs", "cooldown": "cooldown_counter"}
    for state in states_in(opt_state, FollowState):
        if state.memory.keys() != names.keys():
            raise ArgumentError(f"with_plateau: the rule remembers {sorted(state.memory)}, not {sorted(names)}.")

    def restored(state: FollowState) -> FollowState:
        known = {own: torch.full_like(tensor, memory[names[own]]) for own, tensor in state.memory.items()}
        return state._replace(lr=torch.full_like(state.lr, rate), memory=known)

    return with_states(opt_state, {FollowState: restored})
