"""How the arguments, and the launcher's environment, ask for a training to be spread over processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from fts.distributed.device_mesh import Mesh
from fts.distributed.process_group import is_started
from fts.distributed.strategies import DDP, FSDP, DeepSpeed, SingleProcess, Strategy
from fts.errors import ArgumentError
from fts.trainer.arguments import processes
from fts.trainer.arguments.deepspeed_config import config_of, filled
from fts.trainer.arguments.fsdp import always_so, fsdp_of, fsdp_of_launcher, joined
from fts.trainer.arguments.parallelism_config import sizes_of
from fts.trainer.arguments.parsing import ON

if TYPE_CHECKING:
    from fts.trainer.arguments.training_arguments import TrainingArguments

logger = logging.getLogger(__name__)

NOT_HERE = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""What `accelerate launch` turns on by a variable of the environment, and fts does not have."""


def strategy_of(
    args: TrainingArguments, environ: Mapping[str, str] | None = None, *, world: int | None = None, tensor: int | None = None
) -> Strategy:
    """Which strategy the arguments ask for; what they leave open the environment of `accelerate launch` says.

    Args:
        args: the arguments.
        environ: variables of the environment; by default those of the process.
        world: how many processes there are; by default as many as the launcher started.
        tensor: how many of them share each matrix because the model was loaded so; by default as the Trainer has noted.

    Returns:
        The strategy; `SingleProcess` also where several processes share matrices or tokens only, which `mesh_for` tells.

    Raises:
        ArgumentError: what is asked for contradicts itself, or these processes cannot follow it.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> strategy_of(TrainingArguments(ddp_bucket_cap_mb=50), {}, world=2)
    DDP(find_unused_parameters=True, bucket_cap_mb=50, broadcast_buffers=True, static_graph=False, gradient_as_bucket_view=True)
    >>> strategy_of(TrainingArguments(), {}, world=1)
    Single()
    """
    environ = os.environ if environ is None else environ
    world = processes.world_size() if world is None else world
    wanted, config = wanted_of(args, environ), config_of(args.deepspeed, environ)
    asked = f"fsdp={args.fsdp!r}" if wanted is not None else None if config is None else "deepspeed="
    if asked is not None and world == 1 and "RANK" not in environ and not is_started():
        raise ArgumentError(
            f"{asked} shares a model between processes, but the script was not started by a launcher. Start it by "
            f"'torchrun --nproc-per-node 2 script.py' (1 for one process), or leave {asked.partition('=')[0]} out."
        )
    if config is not None:
        return _deepspeed(config, args, mesh_for(args, environ, world=world, tensor=tensor))
    if isinstance(wanted, FSDP):
        return attrs.evolve(wanted, replicate=mesh_for(args, environ, world=world, tensor=tensor).replicate)
    mesh = mesh_for(args, environ, world=world, tensor=tensor)
    if mesh.data > 1:
        return _ddp(args)
    return SingleProcess()


def wanted_of(args: TrainingArguments, environ: Mapping[str, str]) -> FSDP | None:
    """What the arguments or the launcher ask for by name, whatever the processes are; None for nothing.

    Raises:
        ArgumentError: it contradicts itself, or is not there.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> wanted_of(TrainingArguments(), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"})
    FSDP(units='auto', ..., cpu_offload=True, ...)
    """
    of_launcher = fsdp_of_launcher(environ)
    for variable, what in NOT_HERE.items():
        if environ.get(variable, "false").lower() in ON:
            raise ArgumentError(f"{variable} is set, but {what} is not yet in this version of fts. Launch with FSDP instead.")
    if not args.fsdp and of_launcher is None:
        return None
    if config_of(args.deepspeed, environ) is not None:
        raise ArgumentError("Both DeepSpeed and FSDP are asked for, and either cuts the model up. Leave one of them out.")
    settings = joined(of_launcher, _settings(args))
    if settings.get("activation_checkpointing") and args.gradient_checkpointing:
        raise ArgumentError(
            "fsdp_config: activation_checkpointing=True and gradient_checkpointing=True would compute everything three times. "
            "Leave gradient_checkpointing out: FSDP's own does not gather parameters again for it."
        )
    return fsdp_of(args.fsdp or True, settings, precision=args.mixed_precision, machines=_machines(environ))


def mesh_for(
    args: TrainingArguments, environ: Mapping[str, str] | None = None, *, world: int | None = None, tensor: int | None = None
) -> Mesh:
    """How the processes are laid out: sizes that the arguments or the launcher give, and the rest for the data.

    Args:
        args: the arguments; `parallelism_config` is read.
        environ: variables of the environment; by default those of the process.
        world: how many processes there are; by default as many as the launcher started.
        tensor: how many of them share each matrix because the model was loaded so; by default as the Trainer has noted.

    Raises:
        ArgumentError: the sizes do not fit the processes or the strategy.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> mesh_for(TrainingArguments(fsdp=True, parallelism_config={"tp_size": 2}), {}, world=6)
    Mesh(replicate=1, shard=3, context=1, sequence=1, tensor=2)
    """
    environ = os.environ if environ is None else environ
    world = processes.world_size() if world is None else world
    wanted = wanted_of(args, environ)
    tensor = args.__dict__.get("_tp_size", 1) if tensor is None else tensor
    sizes = sizes_of(args.parallelism_config, environ)
    if tensor > 1 and sizes["tensor"] not in (1, tensor):
        raise ArgumentError(
            f"The model was loaded with tp_size={tensor}, but the parallelism config says {sizes['tensor']}. Make them equal."
        )
    sizes["tensor"] = max(tensor, sizes["tensor"])
    said = Mesh(**sizes)
    if world % said.together:
        raise ArgumentError(
            f"{world} processes cannot be cut into groups of {said.together} (tp_size={said.tensor}, cp_size={said.context}, "
            f"sp_size={said.sequence}) that work on the same rows. Start a multiple of {said.together}."
        )
    mesh = attrs.evolve(said, **_of_data(said, world // said.together, wanted))
    if mesh.size != world:
        raise ArgumentError(
            f"The parallelism config lays out {mesh.size} processes (dp_replicate_size={mesh.replicate}, "
            f"dp_shard_size={mesh.shard}, tp_size={mesh.tensor}, cp_size={mesh.context}, sp_size={mesh.sequence}), but {world} "
            "were started."
        )
    if mesh.together > 1 and mesh.data > 1 and wanted is None:
        raise ArgumentError(
            f"{mesh.data} groups of {mesh.together} processes need their gradients summed over groups, which DDP cannot do for "
            "parameters that are cut already. Add fsdp=True."
        )
    return mesh


def remarks(args: TrainingArguments, environ: Mapping[str, str]) -> list[str]:
    """What is worth a warning about the arguments of FSDP: what FSDP2 does otherwise, or that nothing turns it on.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> remarks(TrainingArguments(fsdp_config={"min_num_params": 10}), {})
    ["fsdp_config={'min_num_params': 10} has no effect without fsdp=True."]
    """
    settings = _settings(args)
    if args.fsdp or fsdp_of_launcher(environ) is not None:
        return always_so(settings)
    if any(value not in (None, False, 0, "", [], {}) for key, value in settings.items() if key != "version"):
        return [f"fsdp_config={settings!r} has no effect without fsdp=True."]
    return []


def check_strategy(args: TrainingArguments) -> None:
    """Raise ArgumentError if the arguments and the environment ask for two strategies; warn of what FSDP2 does otherwise."""
    wanted_of(args, os.environ)
    config = config_of(args.deepspeed, os.environ)
    if config is not None:
        DeepSpeed(config)
    for text in remarks(args, os.environ):
        logger.warning(text)


def _ddp(args: TrainingArguments) -> DDP:
    recomputes = bool(args.gradient_checkpointing)
    static = bool(args.ddp_static_graph)
    unused, buffers = args.ddp_find_unused_parameters, args.ddp_broadcast_buffers
    return DDP(
        find_unused_parameters=not (recomputes or static) if unused is None else unused,
        bucket_cap_mb=args.ddp_bucket_cap_mb,
        broadcast_buffers=not recomputes if buffers is None else buffers,
        static_graph=static,
    )


def _deepspeed(config: dict[str, Any], args: TrainingArguments, mesh: Mesh) -> DeepSpeed:
    if mesh.together > 1:
        raise ArgumentError(
            f"deepspeed= gives each process rows of its own, but {mesh.together} processes shall work on the same rows (tp_size, "
            "cp_size, sp_size). Leave those out, or use fsdp=True."
        )
    return DeepSpeed(filled(config, args, mesh.data, auto_find_batch_size=args.auto_find_batch_size))


def _settings(args: TrainingArguments) -> dict[str, Any]:
    return dict(args.fsdp_config) if isinstance(args.fsdp_config, dict) else {}


def _machines(environ: Mapping[str, str]) -> int:
    return max(1, int(environ.get("WORLD_SIZE", 1)) // int(environ.get("LOCAL_WORLD_SIZE", environ.get("WORLD_SIZE", 1))))


def _of_data(said: Mesh, data: int, wanted: FSDP | None) -> dict[str, int]:
    """How many replicas and shards there are: those said, and what is left of so many processes."""
    if not isinstance(wanted, FSDP):
        if said.shard > 1:
            raise ArgumentError(f"The parallelism config says dp_shard_size={said.shard}, but nothing shards. Add fsdp=True.")
        return {"replicate": data if said.replicate == 1 else said.replicate}
    replicate = wanted.replicate if said.replicate == 1 else said.replicate
    if wanted.replicate not in (1, replicate):
        raise ArgumentError(
            f"fsdp: hybrid sharding makes a replica on each of {wanted.replicate} machines, but the parallelism config says "
            f"dp_replicate_size={said.replicate}. Use 'full_shard' with it."
        )
    if said.shard > 1:
        return {"replicate": data // said.shard if replicate == 1 else replicate}
    return {"replicate": replicate, "shard": data // replicate}
