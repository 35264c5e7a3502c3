"""How one step becomes that of many processes: groups, replicas, shards."""

from fts.distributed.async_reduce import AsyncAllReduceMax
from fts.distributed.device_mesh import Mesh, mesh_of
from fts.distributed.distribution import distribute, synchronize
from fts.distributed.fsdp import shard
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
    "destroy_process_group",
    "distribute",
    "init_process_group",
    "mesh_of",
    "shard",
    "synchronize",
]
