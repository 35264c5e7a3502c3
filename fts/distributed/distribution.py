"""One step, made that of several processes."""

from __future__ import annotations

from typing import Any

import attrs
import optree
from torch import Tensor

from fts import steps
from fts.distributed.gradients import AllReduceGradients, DDPGradients, FSDPGradients
from fts.distributed.process_group import Group
from fts.distributed.strategies import DDP
from fts.errors import ArgumentError
from fts.state import TrainState


def distribute(step: Any, group: Group, strategy: DDP | None = None, *, each_batch: bool = False) -> Any:
    """The same step, taken by several processes, each with its own micro-batches.

    A model that `shard` has cut is trained so (FSDP2). Another one is replicated: DDP averages the gradients while the backward
    pass runs; where it cannot (plain functions, the func engine, graphs, a backward pass of your own) they are averaged after it.

    The gradient is `sum(w * g) / sum(w)` over the micro-batches of all processes, and the loss and the metrics that come out are
    theirs, too. Micro-batch i of process r of R draws what number `i * R + r` draws in a process that is alone.

    Args:
        step: what `steps.train_step` and the like make, also compiled.
        group: the processes; for a group of one the step stays as it is.
        strategy: the options of DDP; its defaults if not given.
        each_batch: whether gradients are exchanged after each micro-batch rather than once a step: slower, but a process under
            FSDP2 never has those of the whole model.

    Returns:
        A step of the same kind. Each process calls it with as many micro-batches; `steps.PaddingBatch` ones fill up.

    Raises:
        ArgumentError: nobody can tell where the step's gradients are.
        DistributedError: (from its first call) the processes begin with different parameters.

    >>> import torch
    >>> from fts import transforms as tx
    >>> step = steps.train_step(lambda params, batch: params["w"].sum(), tx.sgd(0.1))
    >>> distribute(step, Group()) is step
    True
    """
    if group.size == 1:
        return step
    gradients = steps.gradients_of(step)
    if gradients is None:
        raise ArgumentError(f"distribute needs a step of fts.steps, not {type(step).__name__}: it cannot see its gradients.")
    binding = gradients.binding
    if binding is not None and binding.sharded:
        return steps.with_collectives(step, FSDPGradients(group, binding.module, each_batch))
    options = attrs.asdict(DDP() if strategy is None else strategy)
    same_buffers = options.pop("broadcast_buffers")
    overlaps = isinstance(gradients, steps.ValueAndGrad) and gradients.engine == "module" and binding is not None
    if overlaps and not _is_compiled(step):
        return steps.with_collectives(
            step, DDPGradients(group, same_buffers, module=binding.module, options=options, each_batch=each_batch)
        )
    return steps.with_collectives(step, AllReduceGradients(group, same_buffers))


def synchronize(state: TrainState, group: Group) -> TrainState:
    """Give each process the state of the first, in place, so that all begin alike.

    Args:
        state: of replicated parameters, of the same names and shapes in each process.
        group: the processes.

    Returns:
        The state.

    >>> import torch
    >>> from fts import transforms as tx
    >>> state = TrainState.create({"w": torch.zeros(2)}, tx.sgd(0.1))
    >>> synchronize(state, Group()) is state
    True
    """
    leaves: list[Any] = optree.tree_leaves((state.params, state.frozen, state.buffers, state.opt_state, state.step))  # type: ignore[arg-type]
    group.copy_first([leaf for leaf in leaves if isinstance(leaf, Tensor) and not hasattr(leaf, "full_tensor")])
    return state


def _is_compiled(step: Any) -> bool:
    inner = getattr(step, "step", None)
    return isinstance(step, steps.CompiledStep) or (inner is not None and _is_compiled(inner))
