"""A Trainer's model, step and state over several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fts import distributed, loops
from fts.distributed import DDP, FSDP, DeepSpeed, Group, Strategy
from fts.distributed.deepspeed import check_installed
from fts.errors import ArgumentError
from fts.steps.binding import is_cut
from fts.trainer.arguments.strategy import mesh_for, strategy_of
from fts.trainer.data.shards import data_group

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer


def parallelize_model(trainer: Trainer) -> None:
    """Find out which processes work on the same rows, and which have others; check that all of it can be done here.

    Raises:
        ArgumentError: the arguments ask for what these processes, or this version, cannot do.
    """
    # noted on the arguments, from which the data is shared
    trainer.args._tp_size = getattr(trainer.model, "_tp_size", None) or 1  # type: ignore[attr-defined]
    if len(set((getattr(trainer.model, "hf_device_map", None) or {}).values())) > 1:
        trainer.args._n_gpu = 1  # type: ignore[attr-defined]  # its layers lie on the GPUs already
    if isinstance(strategy_for(trainer), DeepSpeed):
        check_installed()
    mesh = mesh_for(trainer.args)
    if mesh.context > 1:
        raise ArgumentError(
            f"cp_size={mesh.context}: context parallelism needs torch's ring attention, which runs on CUDA GPUs alone, and fts "
            "does not have it. Use tp_size, or FSDP with activation checkpointing, for long rows."
        )
    if mesh.sequence > 1:
        raise ArgumentError(
            f"sp_size={mesh.sequence}: sequence parallelism is a part of DeepSpeed that needs CUDA GPUs, and fts does not "
            "have it. Use tp_size, or FSDP with activation checkpointing, for long rows."
        )
    trainer.group = data_group(trainer.args)


def strategy_for(trainer: Trainer) -> Strategy:
    """How the trainer's processes share its model."""
    return strategy_of(trainer.args)


def cut_model(trainer: Trainer) -> None:
    """Cut the model's matrices and parameters where the arguments ask for it and they are whole yet; each keeps a part."""
    strategy, mesh = strategy_for(trainer), mesh_for(trainer.args)
    if is_cut(trainer.model) or not (isinstance(strategy, FSDP) or mesh.tensor > 1):
        return
    from fts.distributed.device_mesh import mesh_of
    from fts.distributed.fsdp import shard
    from fts.distributed.tensor_parallel import parallelize

    devices = mesh_of(trainer.world, mesh)
    if mesh.tensor > 1:
        parallelize(trainer.model, devices["tensor"])
    if isinstance(strategy, FSDP):
        shard(trainer.model, devices["replicate", "shard"], strategy)


def spread_step(step: Any, trainer: Trainer) -> Any:
    """The step as all processes take it together."""
    strategy = strategy_for(trainer)
    config: Any = trainer.args.accelerator_config  # settled: an AcceleratorConfig
    each = bool((config.gradient_accumulation_kwargs or {}).get("sync_each_batch"))
    return distributed.distribute(step, trainer.group, strategy if isinstance(strategy, DDP) else None, each_batch=each)


def writer_for(trainer: Trainer) -> loops.AsyncCheckpointer:
    """What writes the trainer's checkpoints, in each process."""
    args, strategy = trainer.args, strategy_for(trainer)
    return loops.AsyncCheckpointer(
        background=args.async_save,
        group=trainer.world,
        each_node=args.save_on_each_node,
        state_dict=strategy.state_dict if isinstance(strategy, FSDP) else "full",
    )


def verifiers(trainer: Trainer) -> Group:
    """The processes that read the same files of a checkpoint: all, or where each machine has its own, each for itself."""
    return Group() if trainer.args.save_on_each_node else trainer.world
