"""Distributed training: process groups, DDP, FSDP2, tensor parallelism, DeepSpeed, and the memory and traffic that each needs."""

from fts.distributed.async_reduce import AsyncAllReduceMax
from fts.distributed.device_mesh import Mesh, init_device_mesh
from fts.distributed.distributed_step import broadcast_state, distribute
from fts.distributed.fsdp import fully_shard
from fts.distributed.process_group import Group, destroy_process_group, init_process_group
from fts.distributed.rank_monitor import RankMonitor
from fts.distributed.strategies import DDP, FSDP, DeepSpeed, SingleProcess, Strategy

__all__ = [
    "DDP",
    "FSDP",
    "AsyncAllReduceMax",
    "DeepSpeed",
    "Group",
    "Mesh",
    "RankMonitor",
    "SingleProcess",
    "Strategy",
    "broadcast_state",
    "destroy_process_group",
    "distribute",
    "fully_shard",
    "init_device_mesh",
    "init_process_group",
]
