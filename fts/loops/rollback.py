"""Rollback: after a failed step, a run continues from an earlier state, with the data after the failed batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar, cast

import attrs
import optree
from torch import Tensor

from fts.errors import ArgumentError, NonFiniteError, SpikeError
from fts.loops.cadence import Counters
from fts.loops.events import Event, RolledBack, Saved, StepBegin, StepEnd
from fts.loops.fit import state_attribute
from fts.loops.position import Position
from fts.state import TrainState

logger = logging.getLogger(__name__)

State = TypeVar("State")
Run: TypeAlias = Callable[[Any, Position], Iterator[Event]]
"""`(state, start)` -> the events of `fit` from there."""

RECOVERABLE_ERRORS: tuple[type[Exception], ...] = (NonFiniteError, SpikeError)


@attrs.frozen
class RollbackPolicy:
    """When and how a run rolls back.

    Attributes:
        every: a copy of the state is kept in memory every so many steps, and wherever a checkpoint was saved, so that a rollback
            never goes back past a checkpoint.
        limit: so many errors are answered by a rollback; the next is raised.
        errors: the errors that are.
        restore: returns the state to continue from, such as that of the last checkpoint, instead of a copy in memory.
        on_copy: called whenever a copy was made, to save what else belongs to it.

    Raises:
        ArgumentError: a number is not positive.
    """

    every: int = 100
    limit: int = 3
    errors: tuple[type[Exception], ...] = RECOVERABLE_ERRORS
    restore: Callable[[], Any] | None = None
    on_copy: Callable[[], object] | None = None

    def __attrs_post_init__(self) -> None:
        for name, value, least in (("every", self.every, 1), ("limit", self.limit, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(f"RollbackPolicy({name}={value!r}) must be a whole number of at least {least}.")


def with_rollback(
    run: Run, state: Any, policy: RollbackPolicy = RollbackPolicy(), *, start: Position = Position()
) -> Iterator[Event]:
    """Run, and where a step fails, continue from the last good state with the batch after the one that failed.

    The steps since that state are lost, and their batches are not used again, so that the run is the one that it would have
    been on data without them. The order of the remaining data, and the randomness of each step, are unchanged.

    Args:
        run: makes the events, from a state and a position: `lambda state, start: loops.fit(step, state, data, start=start, ...)`.
            It is called again after each error; its step must raise one, as those of `steps.with_nonfinite_check`, or of a
            transform such as `tx.skip_nonfinite(..., limit=1)` or `tx.skip_spikes(..., limit=1)` do.
        state: the first state.
        policy: how often the state is copied, and which errors are answered.
        start: where in the data to begin.

    Returns:
        An iterator of events, with `RolledBack` where the run rolled back. The metrics since the last log are dropped there.

    Raises:
        ArgumentError: `run` is not a function.

    >>> from fts import loops
    >>> def step(state, batch):
    ...     if batch < 0:
    ...         raise NonFiniteError
    ...     return state + batch, {}
    >>> data = [1, 2, -1, 4]
    >>> run = lambda state, start: loops.fit(step, state, data, start=start)
    >>> [event.state for event in with_rollback(run, 0, RollbackPolicy(every=1)) if isinstance(event, loops.StepEnd)]
    [1, 3, 7]
    """
    if not callable(run):
        raise ArgumentError(
            f"with_rollback needs a function (state, start) -> events, not {type(run).__name__}. Give "
            "lambda state, start: loops.fit(step, state, data, start=start)."
        )
    good = None if policy.restore is not None else clone_state(state)
    return _with_rollback(run, state, start, policy, good)


def _with_rollback(run: Run, state: Any, start: Position, policy: RollbackPolicy, good: Any) -> Iterator[Event]:
    restore = policy.restore
    for count in range(policy.limit + 1):
        reached = Counters(epoch=start.epoch, batch=start.batch)
        copy_due = False
        try:
            for event in run(state, start):
                if isinstance(event, StepBegin):
                    if copy_due:  # code between two steps may write into the state, as where an evaluation changes the rate
                        good, copy_due = clone_state(event.state), False
                        if policy.on_copy is not None:
                            policy.on_copy()
                    reached = attrs.evolve(event.counters, batch=event.counters.batch + 1)
                elif isinstance(event, StepEnd):
                    copy_due = copy_due or (restore is None and event.counters.step % policy.every == 0)
                elif isinstance(event, Saved):
                    copy_due = restore is None
                yield event
            return
        except policy.errors as error:
            if count == policy.limit:
                error.add_note(f"The run had rolled back {count} times before, the limit of RollbackPolicy(limit={count}).")
                raise
            fault = error
        state = clone_state(good) if restore is None else restore()
        start = reached.position
        step = int(state_attribute(state, "step"))
        lost = reached.step - step
        logger.warning(
            "Step %s failed. The run rolls back to the state of step %s (%s lost) and continues with epoch %s, batch %s. "
            "The error: %s",
            *(reached.step + 1, step, f"{lost} update{'s' * (lost != 1)}", start.epoch, start.batch, fault),
        )
        yield RolledBack(reached, step, fault)


def clone_state(state: State) -> State:
    """A copy of a state, which no step writes; parameters that are not trained are shared, since no step writes them either.

    Args:
        state: a `TrainState`, a tree of them, or of tensors.

    >>> import torch
    >>> old = {"w": torch.ones(1)}
    >>> new = clone_state(old)
    >>> old["w"].zero_()
    tensor([0.])
    >>> new["w"]
    tensor([1.])
    """
    tree: Any = state
    return cast(State, optree.tree_map(_copy_of, tree, is_leaf=lambda part: isinstance(part, TrainState)))


def _copy_of(part: Any) -> Any:
    if isinstance(part, TrainState):
        kept = {name: getattr(part, name) for name in ("params", "buffers", "opt_state", "step")}
        return part.replace(**optree.tree_map(Tensor.clone, cast(Any, kept)))
    return part.clone() if isinstance(part, Tensor) else part
