"""The law of transforms on sharded tensors. All ranks of the group must run it."""

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

_FLOAT64_FACTOR = 0.01  # only the order of sums differs, so float64 agrees to 1e-12


class ShardingLayout(NamedTuple):
    """How parameters are sharded over a group of ranks.

    Attributes:
        mesh_shape: of n ranks.
        shard_dims: for each dimension of the mesh, the dimension of the tensors that it shards; None for replicas.
    """

    mesh_shape: Callable[[int], tuple[int, ...]]
    shard_dims: tuple[int | None, ...]


SHARDING_LAYOUTS = {
    "fsdp": ShardingLayout(lambda n: (n,), (0,)),
    "hsdp": ShardingLayout(lambda n: (2, n // 2), (None, 0)),
    "fsdp+tp": ShardingLayout(lambda n: (n // 2, 2), (0, 1)),
}
"""The layouts of `fully_shard`, of hybrid sharding (HSDP), and of `fully_shard` with tensor parallelism."""


def sharded_equals_full(transform: Transform, params: Params, gradients: Sequence[Params], *, layout: str = "fsdp") -> None:
    """`update`, `update_` and `apply` give the same on sharded tensors as on full ones, and keep the state's placements.

    Args:
        transform: to check.
        params: the parameters, full and equal on all ranks. 0-d ones are not sharded.
        gradients: of successive updates.
        layout: one of `SHARDING_LAYOUTS`.

    Raises:
        LawError: the two differ; a moment has other placements than its parameter; or the info has DTensors, or differs
            between ranks.
        ArgumentError: there is no process group, or no such layout.
    """
    if not torch.distributed.is_initialized():
        raise ArgumentError("sharded_equals_full needs a process group: see fts.testing.check_sharded_transform.")
    if layout not in SHARDING_LAYOUTS:
        raise ArgumentError(f"There is no layout {layout!r}; there are {', '.join(SHARDING_LAYOUTS)}.")
    with law("sharded_equals_full", f"{transform_summary(transform)}, {layout},"):
        for name, path in _paths(transform).items():
            _check_path(name, path, transform, params, gradients, layout)


Path = Callable[[Params, OptState, Params], tuple[Params, OptState, Info, Params]]
"""`(grads, state, params) -> (result, state, info, next params)`; it may overwrite its arguments."""


def _paths(transform: Transform) -> dict[str, Path]:
    def with_apply_updates(update: Any) -> Path:
        def path(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info, Params]:
            updates, state, info = update(grads, state, params)
            return updates, state, info, apply_updates(params, updates)

        return path

    paths = {"update": with_apply_updates(transform.update)}
    if transform.update_ is not None:
        paths["update_"] = with_apply_updates(transform.update_)
    if transform.apply is not None:
        apply = transform.apply

        def apply_path(grads: Params, state: OptState, params: Params) -> tuple[Params, OptState, Info, Params]:
            params, state, info = apply(grads, state, params)
            return params, state, info, params

        paths["apply"] = apply_path
    return paths


def _check_path(name: str, path: Path, transform: Transform, params: Params, gradients: Sequence[Params], layout: str) -> None:
    scale = max_abs(params, gradients)
    tolerance_factor = _FLOAT64_FACTOR if all(tensor.dtype == torch.float64 for tensor in params.values()) else 1.0
    params, shards = clone_tree(params), shard_tensors(params, layout)
    templates = dict(shards)
    state, sharded_state = transform.init(params), transform.init(shards)
    placements = _require_moments_like("after init, state", sharded_state, templates)
    for nth, grads in enumerate(gradients, 1):
        result, state, info, params = path(clone_tree(grads), state, params)
        found, sharded_state, sharded_info, shards = path(shard_tensors(grads, layout), sharded_state, shards)
        for what, tensors in (("result", found), ("parameters", shards)):
            for key, form in templates.items():
                if mesh_and_placements(tensors[key]) != mesh_and_placements(form):
                    fail(
                        f"{name}'s {what}[{key!r}] has {mesh_and_placements(tensors[key])}, expected {mesh_and_placements(form)}"
                    )
        if _require_moments_like(f"{name}'s state", sharded_state, templates) != placements:
            fail(f"{name}'s state has other placements than after init")
        _require_plain(name, sharded_info)
        for what, one, two in (("result", found, result), ("state", sharded_state, state), ("info", sharded_info, info)):
            message = f"{name}'s {what} of update {nth}"
            require_close(message, full_tensors(one), two, scale=scale, tolerance_factor=tolerance_factor, inputs=grads)


def shard_tensors(tensors: Params, layout: str) -> Params:
    """Shard copies of full tensors over all ranks.

    Args:
        tensors: equal on all ranks.
        layout: one of `SHARDING_LAYOUTS`.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, dims = _mesh(layout), SHARDING_LAYOUTS[layout].shard_dims

    def one(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor.detach().clone()
        placements = [Replicate() if dim is None or dim >= tensor.ndim else Shard(dim) for dim in dims]
        return distribute_tensor(tensor.detach().clone(), mesh, placements, src_data_rank=None)

    return {name: one(tensor) for name, tensor in tensors.items()}


def full_tensors(tree: Any) -> Any:
    """A tree with full tensors."""
    return optree.tree_map(lambda leaf: full_tensor(leaf) if isinstance(leaf, Tensor) else leaf, tree)


@lru_cache(maxsize=16)
def _mesh(layout: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", SHARDING_LAYOUTS[layout].mesh_shape(torch.distributed.get_world_size()))


def _require_moments_like(what: str, state: OptState, templates: Params) -> dict[str, Any]:
    """Check the placements of a state's tensors, and return them."""
    for path, leaf in named_tensors(what, state).items():
        if not is_dtensor(leaf):
            continue
        if not leaf.ndim:
            fail(f"{path} is a 0-d DTensor, not a plain tensor")
        if any(placement.is_partial() for placement in mesh_and_placements(leaf)[1]):
            fail(f"{path} has a partial placement")
    for accessor, leaf in zip(*optree.tree_flatten_with_accessor(state)[:2], strict=True):
        for key in accessor.path:
            form = templates.get(key) if isinstance(key, str) else None
            if form is not None and leaf.shape == form.shape and mesh_and_placements(leaf) != mesh_and_placements(form):
                fail(f"{accessor.codify(what)} has {mesh_and_placements(leaf)}, its parameter {mesh_and_placements(form)}")
    return {path: mesh_and_placements(leaf) for path, leaf in named_tensors("state", state).items()}


def _require_plain(name: str, info: Info) -> None:
    for key, value in info.items():
        if is_dtensor(value) or value.ndim:
            fail(f"{name}'s info[{key!r}] is not a plain 0-d tensor")
    if info:
        own = torch.stack([value.detach().double().cpu() for value in info.values()])
        others = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(others, own)
        for rank, other in enumerate(others):
            if not torch.equal(other.nan_to_num(), own.nan_to_num()):
                fail(f"{name} reports {dict(zip(info, other.tolist(), strict=True))} on rank {rank}, {own.tolist()} on this one")
