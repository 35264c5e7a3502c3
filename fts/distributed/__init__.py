"""How one step becomes that of many processes: groups, replicas, shards."""

from fts.distributed.distributing import distribute, synchronize
from fts.distributed.group import Group, start, stop
from fts.distributed.strategies import DDP, FSDP, Single, Strategy

__all__ = [
    "DDP",
    "FSDP",
    "Group",
    "Single",
    "Strategy",
    "distribute",
    "start",
    "stop",
    "synchronize",
]
