"""The law of transforms on tensors that are spread over processes. Every process of the group runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from fts.dtensors import full_tensor, is_dtensor, mesh_and_placements
from fts.errors import ArgumentError
from fts.testing.comparison import clone_tree, fail, law, max_abs, named_tensors, require_close, transform_summary
from fts.transforms import apply_updates
from fts.typing import Info, OptState, Params, Transform

_FINER = 0.01  # the two ways differ in the order of sums alone, so that float64 agrees to 1e-12


class ShardingLayout(NamedTuple):
    """How parameters are spread over processes.

    Attributes:
        sizes: of a mesh of n processes.
        cuts: for each axis of the mesh the axis of the tensors that it cuts, or None where it holds copies.
    """

    sizes: Callable[[int], tuple[int, ...]]
    cuts: tuple[int | None, ...]


SHARDING_LAYOUTS = {
    "shards": ShardingLayout(lambda n: (n,), (0,)),
    "copies of shards": ShardingLayout(lambda n: (2, n // 2), (None, 0)),
    "shards of columns": ShardingLayout(lambda n: (n // 2, 2), (0, 1)),
}
"""The layouts of `fully_shard`, of `fully_shard` in groups (HSDP), and of `fully_shard` over tensor parallelism."""


def sharded_equals_full(transform: Transform, params: Params, gradients: Sequence[Params], *, spread: str = "shards") -> None:
    """`update`, `update_` and `apply` give on spread tensors what they give on whole ones, and keep the state as spread.

    Args:
        transform: is checked.
        params: the parameters, whole and the same on all processes. Those without axes stay so.
        gradients: of successive updates.
        spread: one of `SHARDING_LAYOUTS`.

    Raises:
        LawError: the two differ; a moment is not laid out as its parameter, or what is reported is no plain number that is
            the same everywhere.
        ArgumentError: there is no group of processes, or no such spread.
    """
    if not torch.distributed.is_initialized():
        raise ArgumentError("sharded_equals_full needs a group of processes: see fts.testing.check_sharded_transform.")
    if spread not in SHARDING_LAYOUTS:
        raise ArgumentError(f"There is no spread {spread!r}; there are {', '.join(SHARDING_LAYOUTS)}.")
    with law("sharded_equals_full", f"{transform_summary(transform)}, {spread},"):
        for name, path in _paths(transform).items():
            _path_agrees(name, path, transform, params, gradients, spread)


Path = Callable[[Params, OptState, Params], tuple[Params, OptState, Info, Params]]
"""`(grads, state, params) -> (result, state, info, next params)`; it may overwrite everything."""


def _paths(transform: Transform) -> dict[str, Path]:
    def adding(update: Any) -> Path:
        def path(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info, Params]:
            updates, state, info = update(grads, state, params)
            return updates, state, info, apply_updates(params, updates)

        return path

    paths = {"update": adding(transform.update)}
    if transform.update_ is not None:
        paths["update_"] = adding(transform.update_)
    if transform.apply is not None:
        apply = transform.apply

        def applying(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info, Params]:
            params, state, info = apply(grads, state, params)
            return params, state, info, params

        paths["apply"] = applying
    return paths


def _path_agrees(name: str, path: Path, transform: Transform, params: Params, gradients: Sequence[Params], spread: str) -> None:
    scale = max_abs(params, gradients)
    looser = _FINER if all(tensor.dtype == torch.float64 for tensor in params.values()) else 1.0
    params, parts = clone_tree(params), shard_tensors(params, spread)
    forms = dict(parts)
    state, spread_state = transform.init(params), transform.init(parts)
    layouts = _require_moments_like("after init, state", spread_state, forms)
    for nth, grads in enumerate(gradients, 1):
        result, state, info, params = path(clone_tree(grads), state, params)
        found, spread_state, spread_info, parts = path(shard_tensors(grads, spread), spread_state, parts)
        for what, tensors in (("result", found), ("parameters", parts)):
            for key, form in forms.items():
                if mesh_and_placements(tensors[key]) != mesh_and_placements(form):
                    fail(
                        f"{name}'s {what}[{key!r}] is laid out as {mesh_and_placements(tensors[key])}, not as {mesh_and_placements(form)}"
                    )
        if _require_moments_like(f"{name}'s state", spread_state, forms) != layouts:
            fail(f"{name}'s state is laid out otherwise than after init")
        _require_plain(name, spread_info)
        for what, one, two in (("result", found, result), ("state", spread_state, state), ("info", spread_info, info)):
            require_close(f"{name}'s {what} of update {nth}", full_tensors(one), two, scale=scale, looser=looser, made_from=grads)


def shard_tensors(tensors: Params, spread: str) -> Params:
    """Whole tensors as they are spread over all processes, in memory of their own.

    Args:
        tensors: the same on all processes.
        spread: one of `SHARDING_LAYOUTS`.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, cuts = _mesh(spread), SHARDING_LAYOUTS[spread].cuts

    def one(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor.detach().clone()
        placements = [Replicate() if cut is None or cut >= tensor.ndim else Shard(cut) for cut in cuts]
        return distribute_tensor(tensor.detach().clone(), mesh, placements, src_data_rank=None)

    return {name: one(tensor) for name, tensor in tensors.items()}


def full_tensors(tree: Any) -> Any:
    """A tree with whole tensors."""
    return optree.tree_map(lambda leaf: full_tensor(leaf) if isinstance(leaf, Tensor) else leaf, tree)


@lru_cache(maxsize=16)
def _mesh(spread: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", SHARDING_LAYOUTS[spread].sizes(torch.distributed.get_world_size()))


def _require_moments_like(what: str, state: OptState, forms: Params) -> dict[str, Any]:
    """The layouts of a state's tensors, after a look at them."""
    for path, leaf in named_tensors(what, state).items():
        if not is_dtensor(leaf):
            continue
        if not leaf.ndim:
            fail(f"{path} is a single number and not plain")
        if any(placement.is_partial() for placement in mesh_and_placements(leaf)[1]):
            fail(f"{path} is an unfinished sum over processes")
    for accessor, leaf in zip(*optree.tree_flatten_with_accessor(state)[:2], strict=True):
        for key in accessor.path:
            form = forms.get(key) if isinstance(key, str) else None
            if form is not None and leaf.shape == form.shape and mesh_and_placements(leaf) != mesh_and_placements(form):
                fail(
                    f"{accessor.codify(what)} is laid out as {mesh_and_placements(leaf)}, its parameter as {mesh_and_placements(form)}"
                )
    return {path: mesh_and_placements(leaf) for path, leaf in named_tensors("state", state).items()}


def _require_plain(name: str, info: Info) -> None:
    for key, value in info.items():
        if is_dtensor(value) or value.ndim:
            fail(f"{name}'s info[{key!r}] is no plain single number")
    if info:
        mine = torch.stack([value.detach().double().cpu() for value in info.values()])
        others = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(others, mine)
        for rank, other in enumerate(others):
            if not torch.equal(other.nan_to_num(), mine.nan_to_num()):
                fail(f"{name} reports {dict(zip(info, other.tolist(), strict=True))} on process {rank}, {mine.tolist()} here")
