"""The parallel strategy and the device mesh that the arguments, and the launcher's environment, ask for."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

import attrs

from fts.distributed.device_mesh import Mesh
from fts.distributed.process_group import is_initialized
from fts.distributed.strategies import DDP, FSDP, DeepSpeed, SingleProcess, Strategy
from fts.errors import ArgumentError
from fts.trainer.arguments import processes
from fts.trainer.arguments.deepspeed_config import DeepSpeedArguments, fill_deepspeed_config, load_deepspeed_config
from fts.trainer.arguments.fsdp import fsdp2_differences, fsdp_config_from_environment, make_fsdp, merge_fsdp_config
from fts.trainer.arguments.parallelism_config import mesh_sizes
from fts.trainer.arguments.parsing import TRUE_VALUES

logger = logging.getLogger(__name__)

UNSUPPORTED_BACKENDS = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""Environment variables by which `accelerate launch` turns on what fts does not have."""


class StrategyArguments(DeepSpeedArguments, Protocol):
    """The arguments that decide how processes share the work."""

    fsdp: str | None
    fsdp_config: dict[str, Any] | str | None
    deepspeed: dict[str, Any] | str | None
    parallelism_config: Any
    gradient_checkpointing: bool | None
    auto_find_batch_size: bool
    ddp_find_unused_parameters: bool | None
    ddp_bucket_cap_mb: int | None
    ddp_broadcast_buffers: bool | None
    ddp_static_graph: bool | None


def resolve_strategy(
    args: StrategyArguments,
    environ: Mapping[str, str] | None = None,
    *,
    world_size: int | None = None,
    tp_size: int | None = None,
) -> Strategy:
    """The strategy that the arguments, or else the environment of `accelerate launch`, ask for.

    Args:
        args: the arguments.
        environ: variables of the environment; by default those of the process.
        world_size: how many processes there are; by default as many as the launcher started.
        tp_size: the tensor-parallel size of a model that was loaded so; by default as the Trainer has noted it.

    Returns:
        The strategy; `SingleProcess` also where several processes shard matrices or tokens only, which is in `resolve_mesh`.

    Raises:
        ArgumentError: the arguments contradict each other, or do not fit these processes.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> resolve_strategy(TrainingArguments(ddp_bucket_cap_mb=50), {}, world_size=2)
    DDP(find_unused_parameters=True, bucket_cap_mb=50, broadcast_buffers=True, static_graph=False, gradient_as_bucket_view=True)
    >>> resolve_strategy(TrainingArguments(), {}, world_size=1)
    SingleProcess()
    """
    environ = os.environ if environ is None else environ
    world_size = processes.world_size() if world_size is None else world_size
    fsdp, config = requested_fsdp(args, environ), load_deepspeed_config(args.deepspeed, environ)
    option = f"fsdp={args.fsdp!r}" if fsdp is not None else None if config is None else "deepspeed="
    if option is not None and world_size == 1 and "RANK" not in environ and not is_initialized():
        raise ArgumentError(
            f"{option} shards a model over processes, but the script was not started by a launcher. Start it by "
            f"'torchrun --nproc-per-node 2 script.py' (1 for one process), or leave {option.partition('=')[0]} out."
        )
    mesh = resolve_mesh(args, environ, world_size=world_size, tp_size=tp_size)
    if config is not None:
        return _deepspeed(config, args, mesh)
    if fsdp is not None:
        return attrs.evolve(fsdp, replicate=mesh.replicate)
    return _ddp(args) if mesh.data_parallel_size > 1 else SingleProcess()


def requested_fsdp(args: StrategyArguments, environ: Mapping[str, str]) -> FSDP | None:
    """The FSDP that the arguments or the launcher ask for, independent of the world size; None for none.

    Raises:
        ArgumentError: settings contradict each other, or ask for what fts does not have.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> requested_fsdp(TrainingArguments(), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"})
    FSDP(units='auto', ..., cpu_offload=True, ...)
    """
    launcher_config = fsdp_config_from_environment(environ)
    for variable, what in UNSUPPORTED_BACKENDS.items():
        if environ.get(variable, "false").lower() in TRUE_VALUES:
            raise ArgumentError(f"{variable} is set, but {what} is not yet in this version of fts. Launch with FSDP instead.")
    if not args.fsdp and launcher_config is None:
        return None
    if load_deepspeed_config(args.deepspeed, environ) is not None:
        raise ArgumentError("Both DeepSpeed and FSDP are enabled, and each shards the model. Leave one of them out.")
    settings = merge_fsdp_config(launcher_config, _fsdp_config(args))
    if settings.get("activation_checkpointing") and args.gradient_checkpointing:
        raise ArgumentError(
            "fsdp_config: activation_checkpointing=True and gradient_checkpointing=True would compute everything three times. "
            "Leave gradient_checkpointing out: FSDP's own does not gather parameters again for it."
        )
    return make_fsdp(args.fsdp or True, settings, precision=args.mixed_precision, num_nodes=_num_nodes(environ))


def resolve_mesh(
    args: StrategyArguments,
    environ: Mapping[str, str] | None = None,
    *,
    world_size: int | None = None,
    tp_size: int | None = None,
) -> Mesh:
    """The device mesh: sizes from the arguments or the launcher, and data parallelism over the rest.

    Args:
        args: the arguments; `parallelism_config` is read.
        environ: variables of the environment; by default those of the process.
        world_size: how many processes there are; by default as many as the launcher started.
        tp_size: the tensor-parallel size of a model that was loaded so; by default as the Trainer has noted it.

    Raises:
        ArgumentError: the sizes do not fit the processes or the strategy.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> resolve_mesh(TrainingArguments(fsdp=True, parallelism_config={"tp_size": 2}), {}, world_size=6)
    Mesh(replicate=1, shard=3, context=1, sequence=1, tensor=2)
    """
    environ = os.environ if environ is None else environ
    world_size = processes.world_size() if world_size is None else world_size
    fsdp = requested_fsdp(args, environ)
    tp_size = args.__dict__.get("_tp_size", 1) if tp_size is None else tp_size
    sizes = mesh_sizes(args.parallelism_config, environ)
    if tp_size > 1 and sizes["tensor"] not in (1, tp_size):
        raise ArgumentError(
            f"The model was loaded with tp_size={tp_size}, but the parallelism config says {sizes['tensor']}. Make them equal."
        )
    sizes["tensor"] = max(tp_size, sizes["tensor"])
    given = Mesh(**sizes)
    group_size = given.non_data_parallel_size
    if world_size % group_size:
        raise ArgumentError(
            f"{world_size} processes cannot be divided into groups of {group_size} (tp_size={given.tensor}, "
            f"cp_size={given.context}, sp_size={given.sequence}) with the same examples. Start a multiple of {group_size}."
        )
    mesh = attrs.evolve(given, **_data_parallel_sizes(given, world_size // group_size, fsdp))
    if mesh.size != world_size:
        raise ArgumentError(
            f"The parallelism config lays out {mesh.size} processes (dp_replicate_size={mesh.replicate}, "
            f"dp_shard_size={mesh.shard}, tp_size={mesh.tensor}, cp_size={mesh.context}, sp_size={mesh.sequence}), but "
            f"{world_size} were started."
        )
    if group_size > 1 and mesh.data_parallel_size > 1 and fsdp is None:
        raise ArgumentError(
            f"{mesh.data_parallel_size} groups of {group_size} processes need an all-reduce of gradients over groups, which DDP "
            "cannot do for parameters that are sharded already. Add fsdp=True."
        )
    return mesh


def fsdp_warnings(args: StrategyArguments, environ: Mapping[str, str]) -> list[str]:
    """Warnings about the arguments of FSDP: what FSDP2 does differently, or that nothing turns it on.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> fsdp_warnings(TrainingArguments(fsdp_config={"min_num_params": 10}), {})
    ["fsdp_config={'min_num_params': 10} has no effect without fsdp=True."]
    """
    settings = _fsdp_config(args)
    if args.fsdp or fsdp_config_from_environment(environ) is not None:
        return fsdp2_differences(settings)
    if any(value not in (None, False, 0, "", [], {}) for key, value in settings.items() if key != "version"):
        return [f"fsdp_config={settings!r} has no effect without fsdp=True."]
    return []


def check_strategy(args: StrategyArguments) -> None:
    """Raise ArgumentError if the arguments and the environment ask for two strategies; log `fsdp_warnings`."""
    requested_fsdp(args, os.environ)
    config = load_deepspeed_config(args.deepspeed, os.environ)
    if config is not None:
        DeepSpeed(config)
    for text in fsdp_warnings(args, os.environ):
        logger.warning(text)


def _ddp(args: StrategyArguments) -> DDP:
    recompute = bool(args.gradient_checkpointing)
    static = bool(args.ddp_static_graph)
    unused, buffers = args.ddp_find_unused_parameters, args.ddp_broadcast_buffers
    return DDP(
        find_unused_parameters=not (recompute or static) if unused is None else unused,
        bucket_cap_mb=args.ddp_bucket_cap_mb,
        broadcast_buffers=not recompute if buffers is None else buffers,
        static_graph=static,
    )


def _deepspeed(config: dict[str, Any], args: StrategyArguments, mesh: Mesh) -> DeepSpeed:
    if mesh.non_data_parallel_size > 1:
        raise ArgumentError(
            f"deepspeed= gives each process examples of its own, but {mesh.non_data_parallel_size} processes are to work on the "
            "same examples (tp_size, cp_size, sp_size). Leave those out, or use fsdp=True."
        )
    filled = fill_deepspeed_config(config, args, mesh.data_parallel_size, auto_find_batch_size=args.auto_find_batch_size)
    return DeepSpeed(filled)


def _fsdp_config(args: StrategyArguments) -> dict[str, Any]:
    return dict(args.fsdp_config) if isinstance(args.fsdp_config, dict) else {}


def _num_nodes(environ: Mapping[str, str]) -> int:
    return max(1, int(environ.get("WORLD_SIZE", 1)) // int(environ.get("LOCAL_WORLD_SIZE", environ.get("WORLD_SIZE", 1))))


def _data_parallel_sizes(given: Mesh, size: int, fsdp: FSDP | None) -> dict[str, int]:
    """How many replicas and shards there are: those given, and the rest of the data-parallel size."""
    if fsdp is None:
        if given.shard > 1:
            raise ArgumentError(
                f"The parallelism config says dp_shard_size={given.shard}, but nothing is sharded. Add fsdp=True."
            )
        return {"replicate": size if given.replicate == 1 else given.replicate}
    replicate = fsdp.replicate if given.replicate == 1 else given.replicate
    if fsdp.replicate not in (1, replicate):
        raise ArgumentError(
            f"fsdp: hybrid sharding makes a replica on each of {fsdp.replicate} machines, but the parallelism config says "
            f"dp_replicate_size={given.replicate}. Use 'full_shard' with it."
        )
    if given.shard > 1:
        return {"replicate": size // given.shard if replicate == 1 else replicate}
    return {"replicate": replicate, "shard": size // replicate}
