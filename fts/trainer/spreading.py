"""A Trainer's model, step and state over several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fts import distributed
from fts.distributed import DDP, FSDP, Group, Strategy
from fts.state import TrainState
from fts.steps.binding import is_cut
from fts.trainer.arguments.strategies import mesh_for, strategy_of

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer


def strategy_for(trainer: Trainer) -> Strategy:
    """How the trainer's processes share its model."""
    return strategy_of(trainer.args, tensor=trainer.get_tp_size())


def cut_model(trainer: Trainer) -> None:
    """Cut the model into shards where the arguments ask for it, and it is whole yet; each process keeps one."""
    strategy = strategy_for(trainer)
    if not isinstance(strategy, FSDP) or is_cut(trainer.model):
        return
    from fts.distributed.mesh import mesh_of
    from fts.distributed.sharding import shard

    mesh = mesh_of(trainer.world, mesh_for(trainer.args, tensor=trainer.get_tp_size()))
    shard(trainer.model, mesh["replicate", "shard"], strategy)


def spread_step(step: Any, group: Group, strategy: Strategy) -> Any:
    """The step as all processes take it together."""
    return distributed.distribute(step, group, strategy if isinstance(strategy, DDP) else None)


def settle_state(state: TrainState, group: Group) -> TrainState:
    """The state, which all processes begin with as the first one has it."""
    return distributed.synchronize(state, group)
