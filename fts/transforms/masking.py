"""Transforms for some of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeAlias, cast

import torch
from torch import Tensor

from fts.dtensors import local_tensors
from fts.errors import ArgumentError
from fts.transforms._checks import check_transform
from fts.transforms._fast_paths import Update, fast_apply, fast_update, is_fast
from fts.transforms._info import info_of, merged_by_name
from fts.transforms._masks import Mask, as_predicate, check_same_names, format_mask
from fts.typing import Info, OptState, Params, Transform

Label: TypeAlias = Callable[[str, Tensor], Hashable] | Mapping[str, Hashable]
"""The group of a parameter: a function of name and tensor, or a dictionary name -> label."""


def masked(inner: Transform, mask: Mask) -> Transform:
    """Transform the gradients of some parameters and let those of the others pass unchanged.

    Args:
        inner: the transform of the selected gradients.
        mask: a predicate `(name, tensor) -> bool`, a dictionary name -> bool, or a collection of names.

    Returns:
        A transform with the state of `inner` for the selected parameters.

    Raises:
        ArgumentError: the mask is none of these, or (in `init`) a dictionary that omits a parameter.
        UnknownParameterError: (in `init`) the mask names something that is no parameter.

    >>> from fts import transforms as tx
    >>> half = tx.masked(tx.scale(0.5), mask=["w"])
    >>> grads = {"w": torch.tensor([2.0]), "b": torch.tensor([2.0])}
    >>> half.update(grads, half.init(grads), None)[0]
    {'w': tensor([1.]), 'b': tensor([2.])}
    """
    check_transform("masked", inner)
    selects, check_names = as_predicate(mask, "masked")

    def chosen(tensors: Params) -> Params:
        return {name: tensor for name, tensor in tensors.items() if selects(name, tensor)}

    def init(params: Params) -> OptState:
        check_names(params)
        inside = chosen(params)
        return inner.init(inside) if inside else ()

    def through(inner_update: Update) -> Update:
        def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
            inside = chosen(grads if params is None else params)
            if not inside:
                return grads, state, {}
            changed, state, info = inner_update(_subset(grads, inside), state, None if params is None else inside)
            return {**grads, **changed}, state, info

        return update

    inner_apply = fast_apply(inner)

    def apply(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info]:
        inside = chosen(params)
        outside = [name for name in params if name not in inside]
        if outside:
            torch._foreach_add_(local_tensors(params[name] for name in outside), local_tensors(grads[name] for name in outside))
        if not inside:
            return params, state, {}
        changed, state, info = inner_apply(_subset(grads, inside), state, inside)
        return {**params, **changed}, state, info

    return Transform(
        init=init,
        update=through(inner.update),
        apply=apply if is_fast(inner) else None,
        update_=through(fast_update(inner)) if inner.update_ else None,
        check=inner.check,
        label=f"masked({format_mask(mask)})",
        children=(inner,),
    )


def partition(transforms: Mapping[Hashable, Transform], label: Label) -> Transform:
    """Give each group of parameters its own transform.

    Args:
        transforms: transforms by label.
        label: a function `(name, tensor) -> label`, or a dictionary name -> label. It is called in every update and
            must give the same answers.

    Returns:
        A transform whose state is a dictionary of the groups' states, without the groups that are empty. An info
        key that several groups report becomes `key/label`.

    Raises:
        ArgumentError: there are no transforms, or (in `init` and `update`) a label has none.
        UnknownParameterError: (in `init`) a dictionary of labels names something that is no parameter, or omits one.

    >>> from fts import transforms as tx
    >>> params = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    >>> groups = tx.partition(
    ...     {"matrix": tx.scale_by_learning_rate(0.1), "vector": tx.scale_by_learning_rate(0.01)},
    ...     lambda name, tensor: "matrix" if tensor.ndim > 1 else "vector",
    ... )
    >>> updates, _, info = groups.update({"w": torch.ones(2, 2), "b": torch.ones(2)}, groups.init(params), params)
    >>> updates["b"], sorted(info)
    (tensor([-0.0100, -0.0100]), ['lr/matrix', 'lr/vector'])
    """
    if not transforms:
        raise ArgumentError("partition needs at least one transform.")
    transforms = dict(transforms)
    for transform in transforms.values():
        check_transform("partition", transform)
    keys = {key: str(key) for key in transforms}
    if len(set(keys.values())) < len(keys):
        raise ArgumentError(f"partition: two of the labels {list(transforms)} are written alike.")

    def groups_of(tensors: Params) -> dict[Hashable, Params]:
        groups: dict[Hashable, Params] = {key: {} for key in transforms}
        for name, tensor in tensors.items():
            key = label[name] if isinstance(label, Mapping) else label(name, tensor)
            if key not in groups:
                raise ArgumentError(
                    f"partition: parameter {name!r} has the label {key!r}, but there are transforms only for {list(transforms)}."
                )
            groups[key][name] = tensor
        return {key: group for key, group in groups.items() if group}

    def init(params: Params) -> OptState:
        if isinstance(label, Mapping):
            check_same_names("partition", label, params)
        return {keys[key]: transforms[key].init(group) for key, group in groups_of(params).items()}

    def through(updates: dict[Hashable, Update]) -> Update:
        def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
            results: Params = {}
            states, infos = {}, {}
            for key, group in groups_of(grads if params is None else params).items():
                name = keys[key]
                changed, states[name], infos[name] = updates[key](
                    _subset(grads, group), state[name], None if params is None else group
                )
                results.update(changed)
            return {name: results[name] for name in grads}, states, merged_by_name(infos)

        return update

    # an `apply` is a map of the same form, with new parameters in the place of updates
    apply = through({key: cast("Update", fast_apply(transform)) for key, transform in transforms.items()})

    def check(info: Info) -> None:
        for key, transform in transforms.items():
            if transform.check is not None:
                transform.check(info_of(info, keys[key], keys.values()))

    everything = transforms.values()
    return Transform(
        init=init,
        update=through({key: transform.update for key, transform in transforms.items()}),
        apply=apply if is_fast(*everything) else None,
        update_=through({key: fast_update(t) for key, t in transforms.items()}) if any(t.update_ for t in everything) else None,
        check=check if any(t.check for t in everything) else None,
        label=f"partition({', '.join(keys.values())})",
        children=tuple(everything),
    )


def _subset(tensors: Params, names: Params) -> Params:
    return {name: tensors[name] for name in names}
