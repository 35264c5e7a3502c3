"""The strategy of a run: its model, step and checkpoints over several processes."""

from __future__ import annotations

from typing import Any

from torch import nn

from fts import distributed, loops
from fts.distributed import DDP, FSDP, DeepSpeed, Group
from fts.distributed.deepspeed import check_installed
from fts.errors import ArgumentError
from fts.steps.module_binding import uses_fully_shard
from fts.trainer.arguments import TrainingArguments, resolve_mesh, resolve_strategy
from fts.trainer.data import data_parallel_group


def setup_parallelism(args: TrainingArguments, model: nn.Module) -> Group:
    """Find out which ranks share their examples, and check that these processes can do what the arguments ask for.

    Args:
        args: are noted the size of the model's tensor parallelism, from which the data is sharded.
        model: as it was loaded.

    Returns:
        The ranks with batches of their own.

    Raises:
        ArgumentError: the arguments ask for what these processes, or this version, cannot do.
    """
    args._tp_size = getattr(model, "_tp_size", None) or 1  # type: ignore[attr-defined]
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        args._n_gpu = 1  # type: ignore[attr-defined]  # its layers are on the GPUs already
    if isinstance(resolve_strategy(args), DeepSpeed):
        check_installed()
    mesh = resolve_mesh(args)
    if mesh.context > 1:
        raise ArgumentError(
            f"cp_size={mesh.context}: context parallelism needs torch's ring attention, which runs on CUDA GPUs alone, and fts "
            "does not have it. Use tp_size, or FSDP with activation checkpointing, for long sequences."
        )
    if mesh.sequence > 1:
        raise ArgumentError(
            f"sp_size={mesh.sequence}: sequence parallelism is a part of DeepSpeed that needs CUDA GPUs, and fts does not "
            "have it. Use tp_size, or FSDP with activation checkpointing, for long sequences."
        )
    return data_parallel_group(args)


def parallelize_model(model: nn.Module, args: TrainingArguments, world: Group) -> None:
    """Shard the model's parameters where the arguments ask for it and it is not done yet; each rank keeps its local shard."""
    strategy, mesh = resolve_strategy(args), resolve_mesh(args)
    if uses_fully_shard(model) or not (isinstance(strategy, FSDP) or mesh.tensor > 1):
        return
    from fts.distributed.device_mesh import init_device_mesh
    from fts.distributed.fsdp import fully_shard
    from fts.distributed.tensor_parallel import parallelize_module

    devices = init_device_mesh(world, mesh)
    if mesh.tensor > 1:
        parallelize_module(model, devices["tensor"])
    if isinstance(strategy, FSDP):
        fully_shard(model, devices["replicate", "shard"], strategy)


def distribute_step(step: Any, args: TrainingArguments, group: Group) -> Any:
    """The step of all ranks, which reduces their gradients."""
    strategy = resolve_strategy(args)
    config: Any = args.accelerator_config  # parsed: an AcceleratorConfig
    each = bool((config.gradient_accumulation_kwargs or {}).get("sync_each_batch"))
    return distributed.distribute(step, group, strategy if isinstance(strategy, DDP) else None, sync_each_batch=each)


def make_checkpointer(args: TrainingArguments, world: Group) -> loops.AsyncCheckpointer:
    """What writes the checkpoints, in each process."""
    strategy = resolve_strategy(args)
    return loops.AsyncCheckpointer(
        background=args.async_save,
        group=world,
        each_node=args.save_on_each_node,
        state_dict=strategy.state_dict_type if isinstance(strategy, FSDP) else "full",
    )


def reading_group(args: TrainingArguments, world: Group) -> Group:
    """The ranks that read the same files of a checkpoint: all of them, or each alone where each machine has its own files."""
    return Group() if args.save_on_each_node else world
