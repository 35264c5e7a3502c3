"""A module whose parameters are cut into shards, one for each process (FSDP2)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fts.distributed.device_mesh import Mesh, mesh_of
from fts.distributed.process_group import Group, is_started
from fts.distributed.strategies import FSDP
from fts.dtensors import is_sharded, local
from fts.errors import ArgumentError
from fts.messages import some
from fts.steps.activation_offloading import kept_on_cpu

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Nobody calls them, so that nothing would gather their parameters."""

LEAVES = (nn.MultiheadAttention,)
"""They read the weights of their children without calling them."""


def shard(module: nn.Module, mesh: Any, strategy: FSDP = FSDP()) -> nn.Module:
    """Cut the parameters of a module into shards, in place, and let it gather them where it computes.

    All processes begin with the weights of the first, which are scattered one tensor after the other; what the others held may
    lie on the meta device. Names, ties and frozen parameters stay. A step of `steps.train_step` becomes that of all processes by
    `distribute`.

    Args:
        module: any whose forward passes are calls of modules. Parameters become DTensors on the mesh's device.
        mesh: the group, or torch's DeviceMesh of one dimension, or of two: replicas, and shards within each. Of one process, too.
        strategy: what is gathered as one, in which precision, and the rest.

    Returns:
        The module.

    Raises:
        ArgumentError: a class or a name that the strategy names is not there, the mesh has another form than `replicate` says, or
            the module has what cannot be cut: a parameter without a dimension, or of several dtypes in one unit.

    Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", and torch's `fully_shard`.
    """
    from torch.distributed.fsdp import fully_shard

    if isinstance(mesh, Group):
        if not is_started():
            raise ArgumentError(
                "shard needs a group of processes that was started, also of one. Start the script by 'torchrun "
                "--nproc-per-node 1 script.py', or leave shard out."
            )
        layout = Mesh(replicate=strategy.replicate, shard=max(1, mesh.size // strategy.replicate))
        mesh = mesh_of(mesh, layout)["replicate", "shard"]
    device = torch.device(mesh.device_type)
    mesh = _fitting(mesh, strategy)
    ignored = _ignored(module, strategy.ignored)
    units = units_of(module, strategy.units, skip=ignored)
    _check(module, units, ignored)
    _share_parts(module, mesh)
    whole: dict[str, Tensor | None]
    whole = {name: tensor.detach() for name, tensor in _tensors(module) if not is_sharded(tensor)}
    if mesh.get_rank() != int(mesh.mesh.flatten()[0]):
        whole = dict.fromkeys(whole)  # comes from the first
    if strategy.activation_checkpointing:
        for unit in units or [module]:
            _recompute(unit, offload=strategy.activation_checkpointing_offload)
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": ignored, "offload_policy": _offloading(strategy, device)}
    inner, outer = _policies(strategy)
    for unit in units:
        fully_shard(unit, reshard_after_forward=strategy.reshard_after_forward, mp_policy=inner, **options)
    # What is left to the root is needed first in the backward pass, so that freeing it would gather it again at once.
    fully_shard(module, reshard_after_forward=strategy.reshard_after_forward and not units, mp_policy=outer, **options)
    for part in [*units, module]:
        part.register_forward_hook(_free_without_backward)
    _materialize(module, torch.device("cpu") if strategy.cpu_offload else device)
    for tensor in (*ignored, *module.buffers()):
        tensor.data = tensor.data.to(device)
    _scatter(module, mesh, whole)
    return module


def units_of(
    module: nn.Module, units: tuple[str, ...] | int | str | None, *, skip: Iterable[nn.Parameter] = ()
) -> list[nn.Module]:
    """The submodules that are gathered as one each, inner ones first; the module itself is not among them.

    Args:
        module: of which they are parts.
        units: as in `FSDP`.
        skip: parameters that do not count.

    Raises:
        ArgumentError: no submodule is of a class that is named.

    >>> net = nn.Sequential(nn.Linear(9, 9), nn.Sequential(nn.Linear(9, 9), nn.ReLU()))
    >>> units_of(net, 90) == [net[0], net[1][0]]
    True
    >>> units_of(net, ("Liner",))
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: Sequential has no submodule of the class 'Liner'. It has: Linear, ReLU, Sequential.
    """
    if units is None:
        return []
    skipped = {id(parameter) for parameter in skip}
    if isinstance(units, int):
        found = _by_size(module, units, skipped)
    else:
        names = blocks_of(module) if isinstance(units, str) else units
        found = _by_class(module, names, must_be_there=not isinstance(units, str))
    return [unit for unit in found if any(id(p) not in skipped for p in unit.parameters()) and not _shares(module, unit)]


def blocks_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the classes that a transformers model, or one inside of it, says are to stay in one piece.

    >>> blocks_of(nn.Linear(1, 1))
    ()
    """
    return tuple(sorted({name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}))


def _by_class(module: nn.Module, names: Iterable[str], *, must_be_there: bool) -> list[nn.Module]:
    inside = [part for part in module.modules() if part is not module]
    classes = {type(part).__name__ for part in inside}
    for name in names:
        if must_be_there and name not in classes:
            raise ArgumentError(
                f"{type(module).__name__} has no submodule of the class {name!r}. It has: {', '.join(sorted(classes))}."
            )
    return [part for part in reversed(inside) if type(part).__name__ in set(names)]


def _by_size(module: nn.Module, least: int, skipped: set[int]) -> list[nn.Module]:
    """The smallest ones with at least so many parameters, beside those of the units inside of them."""
    found: list[nn.Module] = []
    seen = set(skipped)

    def visit(part: nn.Module) -> int:
        own = [p for p in part.parameters(recurse=isinstance(part, LEAVES)) if id(p) not in seen]
        seen.update(map(id, own))
        count = sum(p.numel() for p in own)
        if not isinstance(part, LEAVES):
            count += sum(map(visit, part.children()))
        if count < least or part is module or isinstance(part, CONTAINERS):
            return count
        found.append(part)
        return 0

    visit(module)
    return found


def _shares(module: nn.Module, unit: nn.Module) -> bool:
    """Whether a parameter of a unit is also used outside of it: then it must be gathered with what uses it, further out."""
    inside = set(unit.modules())
    own = {id(p) for p in unit.parameters()}
    return any(
        id(p) in own for part in module.modules() if part not in inside for p in part._parameters.values() if p is not None
    )


def _ignored(module: nn.Module, patterns: tuple[str, ...]) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    for pattern in patterns:
        parts = {name: part for name, part in module.named_modules() if name and re.fullmatch(pattern, name)}
        if not parts:
            raise ArgumentError(
                f"FSDP: ignored={pattern!r} fits no module of {type(module).__name__}. Correct it, or leave it out."
            )
        for name, part in parts.items():
            trained = [key for key, parameter in part.named_parameters() if parameter.requires_grad]
            if trained:
                raise ArgumentError(
                    f"FSDP: ignored={pattern!r} fits {name!r}, where {some(trained)} is trained: nobody would sum its gradients "
                    "over processes. Freeze it by requires_grad_(False), or leave it out."
                )
            found.update(part.parameters())
    return found


def _fitting(mesh: Any, strategy: FSDP) -> Any:
    """The mesh; of one dimension where there is one replica."""
    replicas = mesh.size(0) if mesh.ndim == 2 else 1
    if mesh.ndim > 2 or replicas != strategy.replicate:
        raise ArgumentError(
            f"FSDP(replicate={strategy.replicate}) does not fit a mesh of {tuple(mesh.shape)} processes. Give a mesh of two "
            "dimensions, replicas and shards, for hybrid sharding; else of one."
        )
    return mesh[mesh.mesh_dim_names[1]] if mesh.ndim == 2 and replicas == 1 else mesh


def _check(module: nn.Module, units: list[nn.Module], ignored: set[nn.Parameter]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0 and parameter not in ignored:
            raise ArgumentError(
                f"FSDP cannot cut {name!r}, which has no dimension. Give it the shape (1,), or freeze and ignore it."
            )
    taken = {id(parameter) for parameter in ignored}
    for unit in [*units, module]:
        own = {name: p for name, p in unit.named_parameters() if id(p) not in taken}
        taken.update(map(id, own.values()))
        dtypes = {p.dtype: name for name, p in own.items() if p.requires_grad}
        if len(dtypes) > 1:
            shown = ", ".join(f"{name!r} {dtype}" for dtype, name in dtypes.items())
            raise ArgumentError(
                f"FSDP gathers the parameters of a unit together, so they need one dtype, but {type(unit).__name__} has {shown}. "
                "Convert the model by .to(dtype), or make what differs a unit of its own."
            )


def _offloading(strategy: FSDP, device: torch.device) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if not strategy.cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=strategy.pin_memory and device.type != "cpu")  # the CPU's own memory needs no pins


def _policies(strategy: FSDP) -> tuple[Any, Any]:
    """Of the units, and of the module as a whole, whose output alone is cast."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = functools.partial(
        MixedPrecisionPolicy, strategy.param_dtype, strategy.reduce_dtype, cast_forward_inputs=strategy.cast_forward_inputs
    )
    return policy(), policy(output_dtype=strategy.output_dtype)


def _recompute(unit: nn.Module, *, offload: bool = False) -> None:
    """Let a module keep its inputs only, and on the CPU if asked, and compute the rest again; its parameters' names stay."""
    from torch.utils.checkpoint import checkpoint

    forward: Callable[..., Any] = unit.forward

    @functools.wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with kept_on_cpu() if offload else nullcontext():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    unit.forward = again


def _free_without_backward(module: Any, args: Any, output: Any) -> None:
    """Where no backward pass follows, free what stays gathered for it: the next forward pass is to see new parameters."""
    if not torch.is_grad_enabled():
        module.reshard()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate what lies on the meta device; `_scatter` fills it."""
    if any(tensor.is_meta for _, tensor in _tensors(module)):
        module.to_empty(device=device)


@torch.no_grad()
def _share_parts(module: nn.Module, mesh: Any) -> None:
    """Where tensor parallelism has cut a parameter, give each process the part that the first one of the mesh has."""
    for parameter in filter(is_sharded, module.parameters()):
        for axis in range(mesh.ndim):
            distributed.broadcast(local(parameter), group_src=0, group=mesh.get_group(axis))


@torch.no_grad()
def _scatter(module: nn.Module, mesh: Any, whole: dict[str, Tensor | None]) -> None:
    """Give each process its part of the first one's tensors, one after the other.

    Args:
        module: has been cut.
        mesh: of the processes.
        whole: the tensors of the first process by their names; of the others the names alone.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    device = torch.device(mesh.device_type)
    for name, tensor in _tensors(module):
        if name not in whole:
            continue
        source = whole.pop(name)
        source = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if source is None else source.to(device)
        placements = getattr(tensor, "placements", [Replicate()] * mesh.ndim)
        part = distribute_tensor(source, mesh, placements, src_data_rank=0)
        local(tensor).copy_(local(part))
