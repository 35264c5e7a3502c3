"""torch optimizers bound to other tensors and another state for a while, and afterwards as they were."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from fts.dtensors import set_data
from fts.errors import ArgumentError, UnknownParameterError
from fts.transforms import _lbfgs
from fts.transforms._tensor_trees import Tree, copied, decode, encode, encode_like, same
from fts.typing import Params

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
# what torch's base class, its LR schedulers and LBFGS keep for themselves: nothing that a step depends on
_BOOKKEEPING = frozenset(
    {
        "state",
        "param_groups",
        "defaults",
        "step",
        "_opt_called",
        "_step_count",
        "_zero_grad_profile_name",
        "_numel_cache",
        *_HOOKS,
    }
) | {"_warned_capturable_if_run_uncaptured"}


@attrs.frozen(eq=False)
class Bound:
    """A torch optimizer.

    Attributes:
        optimizer: has `param_groups`, `state` and `step`.
        parameters: the Parameters that are in its groups, by name.
        given: the options that the caller gave, where that is known.
    """

    optimizer: Any
    parameters: dict[str, nn.Parameter]
    given: frozenset[str] = frozenset()


class Numbers(NamedTuple):
    """Which values of an optimizer, other than its state of each parameter, its steps change.

    Attributes:
        groups: the keys, for each group.
        attributes: the names.
    """

    groups: tuple[frozenset[str], ...]
    attributes: frozenset[str]

    @classmethod
    def none(cls, bound: Bound) -> Numbers:
        """Of an optimizer whose steps change none."""
        return cls(tuple([frozenset() for _ in bound.optimizer.param_groups]), frozenset())

    def union(self, other: Numbers) -> Numbers:
        """Those of both."""
        groups = tuple([one | two for one, two in zip(self.groups, other.groups, strict=True)])
        return Numbers(groups, self.attributes | other.attributes)


class Kept(NamedTuple):
    """All that an optimizer keeps, as trees.

    Attributes:
        params: its state of each parameter.
        groups: of each group, the values that its steps change.
        attributes: those of its own attributes that its steps change.
        common: its state that belongs to no parameter.
    """

    params: dict[str, Tree]
    groups: tuple[dict[str, Tree], ...]
    attributes: dict[str, Tree]
    common: dict[str, Tree]


def build(
    factory: Callable[..., Any],
    groups: Sequence[Mapping[str, Any]] | Callable[[list[str]], Any] | None,
    options: dict[str, Any],
    params: Params,
) -> Bound:
    """A new optimizer for Parameters of its own, which live in the storage of `params`."""
    parameters = {name: nn.Parameter(tensor.detach()) for name, tensor in params.items()}
    chosen = groups(list(params)) if callable(groups) else groups
    param_groups = _param_groups([{"params": list(params)}] if chosen is None else chosen, parameters)
    optimizer = factory([dict(group) for group in param_groups], **options)
    if not is_optimizer(optimizer):
        raise ArgumentError(
            f"from_torch: {factory!r} made {type(optimizer).__name__}, which has no param_groups, state and step."
        )
    held = _held(optimizer)
    if lost := [name for name, parameter in parameters.items() if id(parameter) not in held]:
        raise ArgumentError(f"from_torch: the optimizer left {lost[:5]} out of its param_groups, so they would get no update.")
    return Bound(optimizer, parameters, frozenset(options).union(*param_groups))


def is_optimizer(value: Any) -> bool:
    """Whether it is an instance of something like `torch.optim.Optimizer`."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("param_groups", "state", "step"))


def bind(optimizer: Any, names: Mapping[str, nn.Parameter]) -> Bound:
    """A given optimizer, with the names of its Parameters."""
    by_id: dict[int, str] = {}
    for name, parameter in names.items():
        by_id.setdefault(id(parameter), name)
    held = _held(optimizer)
    if unnamed := [parameter for key, parameter in held.items() if key not in by_id]:
        raise ArgumentError(
            f"from_torch: {len(unnamed)} of the optimizer's parameters are not in `parameters` (the first has the shape "
            f"{list(unnamed[0].shape)}). Pass dict(model.named_parameters()) of the model that the optimizer was made for."
        )
    return Bound(optimizer, {by_id[key]: parameter for key, parameter in held.items()})


def needs_closure(optimizer: Any) -> bool:
    """Whether `step` of an optimizer or of a class of them cannot be called without a closure."""
    step = getattr(optimizer, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if callable(step) else None
    return closure is not None and closure.default is inspect.Parameter.empty


def has_modes(optimizer: Any) -> bool:
    """Whether an optimizer, or a class of them, distinguishes training from evaluation."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextmanager
def swap_tensors(bound: Bound, params: Params, grads: Params) -> Iterator[None]:
    """Point the Parameters at other tensors; at the end they, the groups, the state and the attributes are as before."""
    optimizer, own = bound.optimizer, vars(bound.optimizer)
    tensors = [(parameter, parameter.data, parameter.grad) for parameter in bound.parameters.values()]
    groups, state = [dict(group) for group in optimizer.param_groups], dict(optimizer.state)
    attributes = {key: value for key, value in own.items() if key not in _BOOKKEEPING}
    try:
        for name, parameter in bound.parameters.items():
            parameter.grad = None
            if name in params:
                set_data(parameter, params[name])
                parameter.grad = grads.get(name)
        yield
    finally:
        for parameter, data, grad in tensors:
            parameter.grad = None
            set_data(parameter, data)
            parameter.grad = grad
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(values)
        optimizer.state.clear()
        optimizer.state.update(state)
        for key in own.keys() - attributes.keys() - _BOOKKEEPING:
            del own[key]
        own.update(attributes)


def release(bound: Bound) -> Bound:
    """Let go of the storage that an optimizer was built on, and of the state that it made there."""
    for parameter in bound.parameters.values():
        set_data(parameter, parameter.data.new_empty(0))
    bound.optimizer.state.clear()
    return bound


@contextmanager
def without_hooks(optimizer: Any) -> Iterator[None]:
    """Keep the hooks on an optimizer's steps from seeing those that are only for trial."""
    own = vars(optimizer)
    kept = {key: own[key] for key in _HOOKS if key in own}
    try:
        own.update({key: OrderedDict() for key in kept})
        yield
    finally:
        own.update(kept)


def isolate(bound: Bound) -> None:
    """Give a bound optimizer copies of its own state and attributes, so that a step writes those."""
    optimizer = bound.optimizer
    for key, value in list(optimizer.state.items()):
        optimizer.state[key] = copied(value)
    vars(optimizer).update(copied(_plain_attributes(bound)))


def place(bound: Bound, kept: Kept) -> None:
    """Put a state into a bound optimizer."""
    optimizer = bound.optimizer
    optimizer.state.clear()
    optimizer.state.update(decode(kept.common))
    for name, entry in kept.params.items():
        if entry:
            values = decode(entry)
            optimizer.state[bound.parameters[name]] = _lbfgs.unpack(values) if _is_lbfgs(optimizer) else values
    for group, values in zip(optimizer.param_groups, kept.groups, strict=True):
        group.update(decode(values))
    vars(optimizer).update(decode(kept.attributes))


def picked(groups: Sequence[Mapping[str, Any]], attributes: Mapping[str, Any], numbers: Numbers) -> dict[str, Any]:
    """The values that steps change, out of groups and attributes."""
    return {
        "groups": tuple(
            {key: group.get(key) for key in sorted(keys)} for group, keys in zip(groups, numbers.groups, strict=True)
        ),
        "attributes": {key: attributes.get(key) for key in sorted(numbers.attributes)},
    }


def read(bound: Bound, names: Sequence[str], numbers: Numbers, form: Kept | None = None) -> Kept:
    """What a bound optimizer keeps now; in the structure of `form`, if that is given.

    Raises:
        ArgumentError: it cannot be represented, or has another structure.
    """
    optimizer = bound.optimizer
    entries, rest = _entries(bound, names)
    found = {"params": entries, "common": rest, **picked(optimizer.param_groups, vars(optimizer), numbers)}
    title = type(optimizer).__name__
    if form is None:
        return Kept(**{key: encode(value, f"{title}'s {key}") for key, value in found.items()})
    return Kept(**{key: encode_like(found[key], old, f"{title}'s {key}") for key, old in form._asdict().items()})


class Snapshot(NamedTuple):
    """An optimizer's groups and attributes at one time."""

    groups: list[dict[str, Any]]
    attributes: dict[str, Any]


def changing(bound: Bound, before: Snapshot, skip: frozenset[str]) -> Numbers:
    """Which values have changed since a snapshot, or look as if a step may change them.

    Those are the numbers in groups that no argument of the constructor gives: Prodigy's `d`, schedule-free's `k`.
    """
    optimizer = bound.optimizer
    arguments = {name for kind in type(optimizer).__mro__ for name in _arguments(kind)}
    made = {key for key in getattr(optimizer, "defaults", {}) if key not in arguments and key not in bound.given and key != "lr"}
    groups = []
    for group, old in zip(optimizer.param_groups, before.groups, strict=True):
        keys = {key for key, value in group.items() if key not in old or not same(value, old[key])}
        keys |= {key for key in made & group.keys() if isinstance(group[key], (int, float, Tensor))}
        groups.append(frozenset(keys - skip - {"params"}))
    now, old = _plain_attributes(bound), before.attributes
    return Numbers(tuple(groups), frozenset(key for key in now if key not in old or not same(now[key], old[key])))


def snapshot(bound: Bound) -> Snapshot:
    """Copies of a bound optimizer's groups and plain attributes."""
    groups = [{key: copied(value) for key, value in group.items() if key != "params"} for group in bound.optimizer.param_groups]
    return Snapshot(groups, copied(_plain_attributes(bound)))


def constants(bound: Bound, numbers: Numbers, skip: frozenset[str]) -> Snapshot:
    """The values that no step may change, as they are."""
    groups = [
        {key: value for key, value in group.items() if key not in keys and key not in skip and key != "params"}
        for group, keys in zip(bound.optimizer.param_groups, numbers.groups, strict=True)
    ]
    own = {
        key: value for key, value in vars(bound.optimizer).items() if key not in _BOOKKEEPING and key not in numbers.attributes
    }
    return Snapshot(
        groups, {key: value for key, value in own.items() if value is None or isinstance(value, (int, float, Tensor))}
    )


def check_constants(before: Snapshot, now: Snapshot, title: str) -> None:
    """Raise where a step has changed what it did not change in `init`, so that the state does not hold it."""
    for what, one, other in (
        *((f"param_groups[{i}]", *pair) for i, pair in enumerate(zip(before.groups, now.groups, strict=True))),
        ("attributes", before.attributes, now.attributes),
    ):
        changed = [
            key for key in one.keys() | other.keys() if key not in one or key not in other or not same(one[key], other[key])
        ]
        if changed:
            raise ArgumentError(
                f"{title} changed {sorted(changed)[:5]} of its {what} in a step, but not in its first two steps, from which "
                "from_torch learns what belongs in the state. Its updates could not be replayed or resumed."
            )


def _entries(bound: Bound, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    optimizer = bound.optimizer
    held = {id(parameter) for parameter in bound.parameters.values()}
    rest = {}
    for key, value in optimizer.state.items():
        if id(key) not in held and (isinstance(key, str) or value):
            if not isinstance(key, str):
                raise ArgumentError(
                    f"{type(optimizer).__name__} keeps a state under {key!r:.80}, which is neither one of its parameters nor "
                    "a string; from_torch cannot represent it."
                )
            rest[key] = value
    entries = {name: optimizer.state.get(bound.parameters[name], {}) for name in names if name in bound.parameters}
    if _is_lbfgs(optimizer):
        first = next(iter(bound.parameters))
        history = optimizer.param_groups[0]["history_size"]
        entry = optimizer.state.get(bound.parameters[first], {})
        entries[first] = _lbfgs.pack(entry, history, list(bound.parameters.values()))
    return entries, rest


def _is_lbfgs(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.LBFGS)


def _held(optimizer: Any) -> dict[int, nn.Parameter]:
    return {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}


def _plain_attributes(bound: Bound) -> dict[str, Any]:
    """An optimizer's attributes, without its Parameters and functions."""
    own = vars(bound.optimizer)
    return {key: value for key, value in own.items() if key not in _BOOKKEEPING and not callable(value) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return not isinstance(value, nn.Parameter) and not is_optimizer(value)


def _arguments(kind: type) -> list[str]:
    return list(inspect.signature(vars(kind)["__init__"]).parameters) if "__init__" in vars(kind) else []


def _param_groups(groups: Any, parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The groups with Parameters for names, each in the order of the parameters."""
    if not isinstance(groups, Sequence) or not all(isinstance(group, Mapping) and "params" in group for group in groups):
        raise ArgumentError(
            f'from_torch: groups must be a list of {{"params": names, **options}}, or make one, not {groups!r:.99}.'
        )
    seen: set[str] = set()
    result = []
    for group in groups:
        names = group["params"]
        if isinstance(names, (str, Tensor)) or not all(isinstance(name, str) for name in names):
            raise ArgumentError(f"from_torch: the params of a group must be a collection of names, not {names!r:.200}.")
        inside = set(names)
        if unknown := sorted(inside - parameters.keys()):
            raise UnknownParameterError(
                f"from_torch: groups name {unknown[:5]}, which are not trained; there are {sorted(parameters)[:10]}."
            )
        if twice := sorted(inside & seen):
            raise ArgumentError(f"from_torch: {twice[:5]} are in two groups; name each parameter once.")
        seen |= inside
        result.append({**group, "params": [parameter for name, parameter in parameters.items() if name in inside]})
    if left := [name for name in parameters if name not in seen]:
        raise ArgumentError(
            f"from_torch: {left[:5]} are in no group, so they would get no update. Add them to a group, or freeze them "
            "(requires_grad=False) before the state is created."
        )
    return result
