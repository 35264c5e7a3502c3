"""Fully sharded data parallelism (FSDP2): parameters in shards, one on each rank."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fts.distributed.device_mesh import Mesh, init_device_mesh
from fts.distributed.process_group import Group, is_initialized
from fts.distributed.strategies import FSDP
from fts.dtensors import is_dtensor, to_local
from fts.errors import ArgumentError
from fts.messages import abbreviate
from fts.steps.activation_offloading import save_on_cpu

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules without a forward pass, in which their parameters would be gathered."""

OPAQUE_MODULES = (nn.MultiheadAttention,)
"""Modules that read the weights of their children without calling them."""


def fully_shard(module: nn.Module, mesh: Any, strategy: FSDP = FSDP()) -> nn.Module:
    """Shard the parameters of a module, in place; its forward and backward passes gather them.

    All ranks start with the weights of the main process, which are scattered one tensor after the other; those of the other ranks
    may be on the meta device. Names, ties and frozen parameters stay. Use `distribute` for its steps.

    Args:
        module: any whose forward passes are calls of modules. Parameters become DTensors on the mesh's device.
        mesh: the group, or torch's DeviceMesh of one dimension, or of two: replicas, and shards within each. Also of one process.
        strategy: the FSDP units, the precision, and other options.

    Returns:
        The module.

    Raises:
        ArgumentError: the strategy names a class or module that does not exist, the mesh does not fit `replicate`, or the module
            cannot be sharded: a parameter has no dimension, or a unit has several dtypes.

    Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", and torch's `fully_shard`.
    """
    from torch.distributed import fsdp

    if isinstance(mesh, Group):
        if not is_initialized():
            raise ArgumentError(
                "fully_shard needs an initialized process group, also for one process. Start the script by 'torchrun "
                "--nproc-per-node 1 script.py', or leave fully_shard out."
            )
        layout = Mesh(replicate=strategy.replicate, shard=max(1, mesh.size // strategy.replicate))
        mesh = init_device_mesh(mesh, layout)["replicate", "shard"]
    device = torch.device(mesh.device_type)
    mesh = _check_mesh(mesh, strategy)
    ignored = _ignored_params(module, strategy.ignored_modules)
    units = find_fsdp_units(module, strategy.units, skip=ignored)
    _check_params(module, units, ignored)
    _broadcast_local_shards(module, mesh)
    full_tensors: dict[str, Tensor | None]
    full_tensors = {name: tensor.detach() for name, tensor in _named_tensors(module) if not is_dtensor(tensor)}
    if mesh.get_rank() != int(mesh.mesh.flatten()[0]):
        full_tensors = dict.fromkeys(full_tensors)  # scattered from the first rank
    if strategy.activation_checkpointing:
        for unit in units or [module]:
            _checkpoint_activations(unit, offload=strategy.activation_checkpointing_offload)
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": ignored, "offload_policy": _offload_policy(strategy, device)}
    inner, outer = _mixed_precision_policies(strategy)
    for unit in units:
        fsdp.fully_shard(unit, reshard_after_forward=strategy.reshard_after_forward, mp_policy=inner, **options)
    # The backward pass needs the root's own parameters first, so freeing them would gather them again at once.
    fsdp.fully_shard(module, reshard_after_forward=strategy.reshard_after_forward and not units, mp_policy=outer, **options)
    for part in [*units, module]:
        part.register_forward_hook(_reshard_without_backward)
    _materialize(module, torch.device("cpu") if strategy.cpu_offload else device)
    for tensor in (*ignored, *module.buffers()):
        tensor.data = tensor.data.to(device)
    _scatter_full_tensors(module, mesh, full_tensors)
    return module


def find_fsdp_units(
    module: nn.Module, units: tuple[str, ...] | int | str | None, *, skip: Iterable[nn.Parameter] = ()
) -> list[nn.Module]:
    """The submodules that become FSDP units, inner ones first, without the module itself.

    Args:
        module: the root.
        units: as in `FSDP`.
        skip: parameters that do not count.

    Raises:
        ArgumentError: no submodule is of a given class.

    >>> net = nn.Sequential(nn.Linear(9, 9), nn.Sequential(nn.Linear(9, 9), nn.ReLU()))
    >>> find_fsdp_units(net, 90) == [net[0], net[1][0]]
    True
    >>> find_fsdp_units(net, ("Liner",))
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: Sequential has no submodule of the class 'Liner'. It has: Linear, ReLU, Sequential.
    """
    if units is None:
        return []
    skipped = {id(parameter) for parameter in skip}
    if isinstance(units, int):
        found = _find_by_size(module, units, skipped)
    else:
        names = no_split_modules(module) if isinstance(units, str) else units
        found = _find_by_class(module, names, must_be_there=not isinstance(units, str))
    return [unit for unit in found if any(id(p) not in skipped for p in unit.parameters()) and not _is_used_outside(module, unit)]


def no_split_modules(module: nn.Module) -> tuple[str, ...]:
    """The class names in `_no_split_modules` of a transformers model, or of models inside it.

    >>> no_split_modules(nn.Linear(1, 1))
    ()
    """
    return tuple(sorted({name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}))


def _find_by_class(module: nn.Module, names: Iterable[str], *, must_be_there: bool) -> list[nn.Module]:
    inside = [part for part in module.modules() if part is not module]
    classes = {type(part).__name__ for part in inside}
    for name in names:
        if must_be_there and name not in classes:
            raise ArgumentError(
                f"{type(module).__name__} has no submodule of the class {name!r}. It has: {', '.join(sorted(classes))}."
            )
    return [part for part in reversed(inside) if type(part).__name__ in set(names)]


def _find_by_size(module: nn.Module, least: int, skipped: set[int]) -> list[nn.Module]:
    """The smallest submodules with at least so many parameters, not counting those of units inside them."""
    found: list[nn.Module] = []
    seen = set(skipped)

    def visit(part: nn.Module) -> int:
        own = [p for p in part.parameters(recurse=isinstance(part, OPAQUE_MODULES)) if id(p) not in seen]
        seen.update(map(id, own))
        count = sum(p.numel() for p in own)
        if not isinstance(part, OPAQUE_MODULES):
            count += sum(map(visit, part.children()))
        if count < least or part is module or isinstance(part, CONTAINERS):
            return count
        found.append(part)
        return 0

    visit(module)
    return found


def _is_used_outside(module: nn.Module, unit: nn.Module) -> bool:
    """Whether a parameter of a unit is also used outside it: then an outer unit must gather it."""
    inside = set(unit.modules())
    own = {id(p) for p in unit.parameters()}
    return any(
        id(p) in own for part in module.modules() if part not in inside for p in part._parameters.values() if p is not None
    )


def _ignored_params(module: nn.Module, patterns: tuple[str, ...]) -> set[nn.Parameter]:
    found: set[nn.Parameter] = set()
    for pattern in patterns:
        parts = {name: part for name, part in module.named_modules() if name and re.fullmatch(pattern, name)}
        if not parts:
            raise ArgumentError(
                f"FSDP: ignored_modules={pattern!r} fits no module of {type(module).__name__}. Correct it, or leave it out."
            )
        for name, part in parts.items():
            trained = [key for key, parameter in part.named_parameters() if parameter.requires_grad]
            if trained:
                raise ArgumentError(
                    f"FSDP: ignored_modules={pattern!r} fits {name!r}, where {abbreviate(trained)} is trained: its "
                    "gradients would not be reduced over ranks. Freeze it by requires_grad_(False), or leave it out."
                )
            found.update(part.parameters())
    return found


def _check_mesh(mesh: Any, strategy: FSDP) -> Any:
    """The mesh, of one dimension where there is one replica."""
    replicas = mesh.size(0) if mesh.ndim == 2 else 1
    if mesh.ndim > 2 or replicas != strategy.replicate:
        raise ArgumentError(
            f"FSDP(replicate={strategy.replicate}) does not fit a mesh of {tuple(mesh.shape)} processes. Give a mesh of two "
            "dimensions, replicas and shards, for hybrid sharding; else of one."
        )
    return mesh[mesh.mesh_dim_names[1]] if mesh.ndim == 2 and replicas == 1 else mesh


def _check_params(module: nn.Module, units: list[nn.Module], ignored: set[nn.Parameter]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0 and parameter not in ignored:
            raise ArgumentError(
                f"FSDP cannot shard {name!r}, which has no dimension. Give it the shape (1,), or freeze and ignore it."
            )
    taken = {id(parameter) for parameter in ignored}
    for unit in [*units, module]:
        own = {name: p for name, p in unit.named_parameters() if id(p) not in taken}
        taken.update(map(id, own.values()))
        dtypes = {p.dtype: name for name, p in own.items() if p.requires_grad}
        if len(dtypes) > 1:
            shown = ", ".join(f"{name!r} {dtype}" for dtype, name in dtypes.items())
            raise ArgumentError(
                f"FSDP gathers the parameters of a unit as one, so they need one dtype, but {type(unit).__name__} has {shown}. "
                "Convert the model by .to(dtype), or make what differs a unit of its own."
            )


def _offload_policy(strategy: FSDP, device: torch.device) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if not strategy.cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=strategy.pin_memory and device.type != "cpu")  # only copies to a GPU need pinned memory


def _mixed_precision_policies(strategy: FSDP) -> tuple[Any, Any]:
    """The policies of the units and of the root, whose output alone is cast."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = functools.partial(
        MixedPrecisionPolicy, strategy.param_dtype, strategy.reduce_dtype, cast_forward_inputs=strategy.cast_forward_inputs
    )
    return policy(), policy(output_dtype=strategy.output_dtype)


def _checkpoint_activations(unit: nn.Module, *, offload: bool = False) -> None:
    """Checkpoint the activations of a module, with its inputs on the CPU if `offload`; the names of its parameters stay."""
    from torch.utils.checkpoint import checkpoint

    forward: Callable[..., Any] = unit.forward

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with save_on_cpu() if offload else nullcontext():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    unit.forward = checkpointed


def _reshard_without_backward(module: Any, args: Any, output: Any) -> None:
    """Free parameters that stay gathered for a backward pass, if none follows: the next forward pass must see new parameters."""
    if not torch.is_grad_enabled():
        module.reshard()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate tensors that are on the meta device; `_scatter_full_tensors` fills them."""
    if any(tensor.is_meta for _, tensor in _named_tensors(module)):
        module.to_empty(device=device)


@torch.no_grad()
def _broadcast_local_shards(module: nn.Module, mesh: Any) -> None:
    """Broadcast the local shards of tensor-parallel parameters from the first rank of the mesh."""
    for parameter in filter(is_dtensor, module.parameters()):
        for axis in range(mesh.ndim):
            distributed.broadcast(to_local(parameter), group_src=0, group=mesh.get_group(axis))


@torch.no_grad()
def _scatter_full_tensors(module: nn.Module, mesh: Any, full_tensors: dict[str, Tensor | None]) -> None:
    """Scatter the tensors of the first rank, one after the other.

    Args:
        module: after `fully_shard`.
        mesh: its device mesh.
        full_tensors: of the first rank by name; on the other ranks the names alone.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    device = torch.device(mesh.device_type)
    for name, tensor in _named_tensors(module):
        if name not in full_tensors:
            continue
        source = full_tensors.pop(name)
        source = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if source is None else source.to(device)
        placements = getattr(tensor, "placements", [Replicate()] * mesh.ndim)
        sharded = distribute_tensor(source, mesh, placements, src_data_rank=0)
        to_local(tensor).copy_(to_local(sharded))
