"""Transforms one after another."""

from __future__ import annotations

from collections.abc import Callable

from fts.dtensors import redistribute_like
from fts.errors import ArgumentError
from fts.transforms._checks import check_transform
from fts.transforms._fast_paths import Apply, Update, fast_apply, fast_update, is_fast
from fts.transforms._info import info_of, merged, merged_by_name
from fts.typing import Info, OptState, Params, Transform


class _Chain(Transform):
    """An unnamed chain: its children take its place in another chain."""


def apply_updates(params: Params, updates: Params) -> Params:
    """Add updates to parameters.

    Args:
        params: tensors by name.
        updates: tensors of the same names and shapes.

    Returns:
        New tensors in the dtypes of `params`; nothing is written.

    >>> import torch
    >>> apply_updates({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, -0.5])})
    {'w': tensor([1.5000, 1.5000])}
    """
    updates = redistribute_like(updates, params)
    return {name: (param + updates[name]).to(param.dtype) for name, param in params.items()}


def identity() -> Transform:
    """Return the gradients unchanged; the neutral element of `chain`.

    Returns:
        A transform without state.

    >>> import torch
    >>> updates, _, _ = identity().update({"w": torch.tensor([3.0])}, (), None)
    >>> updates
    {'w': tensor([3.])}
    """
    return chain()._replace(label="identity()")


def chain(*transforms: Transform, **named: Transform) -> Transform:
    """Feed the updates of each transform to the next.

    Unnamed chains inside are flattened, so `chain(a, chain(b, c))`, `chain(chain(a, b), c)` and `chain(a, b, c)`
    are the same, with the same state and info.

    Args:
        transforms: in the order of application.
        named: further transforms, which come after those without a name.

    Returns:
        A transform whose state is a tuple of the children's states or, with names, a dictionary of them, where a
        child without a name goes by its index ("0", "1", ...). An info key that comes twice gets a suffix: `lr`,
        `lr_2`, or with names `lr/first`, `lr/second`.

    Raises:
        ArgumentError: something is not a transform, or a name is taken by an index.

    >>> import torch
    >>> from fts import transforms as tx
    >>> both = tx.chain(tx.clip_by_global_norm(1.0), tx.scale(-0.1))
    >>> params = {"w": torch.zeros(2)}
    >>> updates, state, info = both.update({"w": torch.tensor([3.0, 4.0])}, both.init(params), params)
    >>> updates["w"], info["grad_norm"]
    (tensor([-0.0600, -0.0800]), tensor(5.))
    """
    for transform in (*transforms, *named.values()):
        check_transform("chain", transform)
    flat: list[Transform] = []
    for transform in transforms:
        if isinstance(transform, _Chain):
            flat.extend(transform.children)
        else:
            flat.append(transform)
    if not named:
        return _Chain(*_composed(flat, tuple, list, merged, None))._replace(label="chain" if flat else "identity()")
    keys = [str(i) for i in range(len(flat))]
    taken = sorted(named.keys() & set(keys))
    if taken:
        raise ArgumentError(f"chain: the name {taken[0]!r} stands for the child at that index; choose another name.")
    keys += named
    return _composed(
        [*flat, *named.values()],
        lambda states: dict(zip(keys, states, strict=True)),
        lambda state: [state[key] for key in keys],
        lambda infos: merged_by_name(dict(zip(keys, infos, strict=True))),
        keys,
    )._replace(label=f"chain({', '.join(named)})")


def _composed(
    children: list[Transform],
    pack: Callable[[list[OptState]], OptState],
    unpack: Callable[[OptState], list[OptState]],
    merge: Callable[[list[Info]], Info],
    keys: list[str] | None,
) -> Transform:
    def through(updates: list[Update]) -> Update:
        def update(grads: Params, state: OptState, params: Params | None) -> tuple[Params, OptState, Info]:
            states, infos = [], []
            for child, child_state in zip(updates, unpack(state), strict=True):
                grads, child_state, info = child(grads, child_state, params)
                states.append(child_state)
                infos.append(info)
            return grads, pack(states), merge(infos)

        return update

    def check(info: Info) -> None:
        for i, child in enumerate(children):
            if child.check is not None:
                child.check(info if keys is None else info_of(info, keys[i], keys))

    return Transform(
        init=lambda params: pack([child.init(params) for child in children]),
        update=through([child.update for child in children]),
        apply=_chained_apply(children, pack, unpack, merge) if is_fast(*children) else None,
        update_=through([fast_update(child) for child in children]) if any(child.update_ for child in children) else None,
        check=check if any(child.check for child in children) else None,
        children=tuple(children),
    )


def _chained_apply(
    children: list[Transform],
    pack: Callable[[list[OptState]], OptState],
    unpack: Callable[[OptState], list[OptState]],
    merge: Callable[[list[Info]], Info],
) -> Apply:
    front, last = [fast_update(child) for child in children[:-1]], fast_apply(children[-1])

    def apply(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info]:
        states, infos = [], []
        *front_states, last_state = unpack(state)
        for child, child_state in zip(front, front_states, strict=True):
            grads, child_state, info = child(grads, child_state, params)
            states.append(child_state)
            infos.append(info)
        params, last_state, info = last(grads, last_state, params)
        states.append(last_state)
        infos.append(info)
        return params, pack(states), merge(infos)

    return apply
