"""How one step becomes that of many processes: groups, replicas, shards."""

from fts.distributed.agreeing import Agreement
from fts.distributed.distributing import distribute, synchronize
from fts.distributed.group import Group, start, stop
from fts.distributed.mesh import Mesh, mesh_of
from fts.distributed.peers import Peers
from fts.distributed.sharding import shard
from fts.distributed.strategies import DDP, FSDP, DeepSpeed, Single, Strategy

__all__ = [
    "DDP",
    "FSDP",
    "Agreement",
    "DeepSpeed",
    "Group",
    "Mesh",
    "Peers",
    "Single",
    "Strategy",
    "distribute",
    "mesh_of",
    "shard",
    "start",
    "stop",
    "synchronize",
]
