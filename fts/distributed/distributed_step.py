"""A distributed training step: a step of one process, taken by all ranks."""

from __future__ import annotations

from typing import Any

import attrs
import optree
from torch import Tensor

from fts import steps
from fts.distributed.gradient_sync import AllReduceGradients, DDPGradients, FSDPGradients
from fts.distributed.process_group import Group
from fts.distributed.strategies import DDP
from fts.errors import ArgumentError
from fts.state import TrainState


def distribute(step: Any, group: Group, strategy: DDP | None = None, *, sync_each_batch: bool = False) -> Any:
    """The same step, taken by all ranks, each with its own micro-batches.

    A model after `fully_shard` is trained with FSDP2. Another one is replicated: DDP averages the gradients during the backward
    pass; where it cannot (plain functions, the func engine, graphs, a manual backward pass) they are averaged after it.

    The gradient is `sum(w * g) / sum(w)` over the micro-batches of all ranks, and so are the loss and the metrics. Micro-batch i
    of rank r draws the random numbers that micro-batch `i * world_size + r` draws in a single process.

    Args:
        step: from `steps.train_step` and the like, also compiled.
        group: the processes; with one the step stays as it is.
        strategy: the options of DDP; its defaults if not given.
        sync_each_batch: whether gradients are reduced after each micro-batch rather than once a step: slower, but a process under
            FSDP2 never holds the full gradients.

    Returns:
        A step of the same kind. All ranks call it with equally many micro-batches; use `steps.PaddingBatch` to fill up.

    Raises:
        ArgumentError: the step is not one of fts, so its gradients cannot be reduced.
        DistributedError: (from its first call) the ranks start with different parameters.

    >>> import torch
    >>> from fts import transforms as tx
    >>> step = steps.train_step(lambda params, batch: params["w"].sum(), tx.sgd(0.1))
    >>> distribute(step, Group()) is step
    True
    """
    if group.size == 1:
        return step
    gradients = steps.find_gradient_fn(step)
    if gradients is None:
        raise ArgumentError(f"distribute needs a step of fts.steps, not {type(step).__name__}: it cannot see its gradients.")
    binding = gradients.binding
    if binding is not None and binding.fully_sharded:
        return steps.with_collectives(step, FSDPGradients(group, binding.module, sync_each_batch))
    options = attrs.asdict(DDP() if strategy is None else strategy)
    broadcast_buffers = options.pop("broadcast_buffers")
    overlaps = isinstance(gradients, steps.ValueAndGrad) and gradients.engine == "module" and binding is not None
    if overlaps and not _is_compiled(step):
        return steps.with_collectives(
            step, DDPGradients(group, broadcast_buffers, module=binding.module, options=options, sync_each_batch=sync_each_batch)
        )
    return steps.with_collectives(step, AllReduceGradients(group, broadcast_buffers))


def broadcast_state(state: TrainState, group: Group) -> TrainState:
    """Broadcast the state of the main process to all ranks, in place.

    Args:
        state: of replicated parameters, with the same names and shapes on each rank.
        group: the processes.

    Returns:
        The state.

    >>> import torch
    >>> from fts import transforms as tx
    >>> state = TrainState.create({"w": torch.zeros(2)}, tx.sgd(0.1))
    >>> broadcast_state(state, Group()) is state
    True
    """
    leaves: list[Any] = optree.tree_leaves((state.params, state.frozen, state.buffers, state.opt_state, state.step))  # type: ignore[arg-type]
    group.broadcast_([leaf for leaf in leaves if isinstance(leaf, Tensor) and not hasattr(leaf, "full_tensor")])
    return state


def _is_compiled(step: Any) -> bool:
    inner = getattr(step, "step", None)
    return isinstance(step, steps.CompiledStep) or (inner is not None and _is_compiled(inner))
