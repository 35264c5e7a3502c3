"""Going back to an earlier state where a step failed, and on with the data behind the batch that failed."""

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
from fts.loops.fit import attribute_of
from fts.loops.position import Position
from fts.state import TrainState

logger = logging.getLogger(__name__)

State = TypeVar("State")
Run: TypeAlias = Callable[[Any, Position], Iterator[Event]]
"""`(state, start)` -> the events of `fit` from there."""

FAULTS: tuple[type[Exception], ...] = (NonFiniteError, SpikeError)


def rolling_back(
    run: Run,
    state: Any,
    *,
    start: Position = Position(),
    every: int = 100,
    limit: int = 3,
    faults: tuple[type[Exception], ...] = FAULTS,
    restore: Callable[[], Any] | None = None,
    copied: Callable[[], object] | None = None,
) -> Iterator[Event]:
    """Run, and where a step fails, go on from the last good state with the batch behind the one that failed.

    The steps since that state are lost, and their batches are not seen again, so that the run is the one that it would have
    been on data without them. The order of what is left, and the randomness of each step, are unchanged.

    Args:
        run: makes the events, from a state and a position: `lambda state, start: loops.fit(step, state, data, start=start, ...)`.
            It is called again after each fault; its step must raise one, as those of `steps.with_nonfinite_check`, or of a
            transform such as `tx.skip_nonfinite(..., limit=1)` or `tx.skip_spikes(..., limit=1)` do.
        state: the first state.
        start: where in the data to begin.
        every: a copy of the state is kept in memory every so many steps, and wherever a checkpoint was saved, so that none is of
            steps that the run takes back.
        limit: so many faults are answered in this way; the next is raised.
        faults: the errors that are.
        restore: gives the state to go on from, such as that of the last checkpoint, instead of a copy in memory.
        copied: called whenever a copy was made, to remember what else belongs to it.

    Returns:
        An iterator of events, with `RolledBack` where the run went back. The metrics since the last log are dropped there.

    Raises:
        ArgumentError: a number is not positive, or `run` is no function.

    >>> from fts import loops
    >>> def step(state, batch):
    ...     if batch < 0:
    ...         raise NonFiniteError
    ...     return state + batch, {}
    >>> data = [1, 2, -1, 4]
    >>> events = rolling_back(lambda state, start: loops.fit(step, state, data, start=init_process_group), 0, every=1)
    >>> [event.state for event in events if isinstance(event, loops.StepEnd)]
    [1, 3, 7]
    """
    for name, value, least in (("every", every, 1), ("limit", limit, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"rolling_back({name}={value!r}) must be a whole number of at least {least}.")
    if not callable(run):
        raise ArgumentError(
            f"rolling_back needs a function (state, start) -> events, not {type(run).__name__}. Give "
            "lambda state, start: loops.fit(step, state, data, start=start)."
        )
    good = None if restore is not None else detached(state)
    return _rolling_back(run, state, start, every, limit, faults, restore, good, copied)


def _rolling_back(
    run: Run,
    state: Any,
    start: Position,
    every: int,
    limit: int,
    faults: tuple[type[Exception], ...],
    restore: Callable[[], Any] | None,
    good: Any,
    copied: Callable[[], object] | None,
) -> Iterator[Event]:
    for count in range(limit + 1):
        reached = Counters(epoch=start.epoch, batch=start.batch)
        due = False
        try:
            for event in run(state, start):
                if isinstance(event, StepBegin):
                    if due:  # what is done between two steps may write into the state, as where an evaluation moves the rate
                        good, due = detached(event.state), False
                        if copied is not None:
                            copied()
                    reached = attrs.evolve(event.counters, batch=event.counters.batch + 1)
                elif isinstance(event, StepEnd):
                    due = due or (restore is None and event.counters.step % every == 0)
                elif isinstance(event, Saved):
                    due = restore is None
                yield event
            return
        except faults as error:
            if count == limit:
                error.add_note(f"The run had gone back {count} times before, which is the limit: rolling_back(limit={limit}).")
                raise
            fault = error
        state = detached(good) if restore is None else restore()
        start = reached.position
        step = int(attribute_of(state, "step"))
        lost = reached.step - step
        logger.warning(
            "Step %s failed. The run goes back to the state of step %s (%s lost) and on with epoch %s, batch %s. The error: %s",
            *(reached.step + 1, step, f"{lost} update{'s' * (lost != 1)}", start.epoch, start.batch, fault),
        )
        yield RolledBack(reached, step, fault)


def detached(state: State) -> State:
    """A copy of a state that no step will write; parameters that are not trained are shared, as none writes them.

    Args:
        state: a `TrainState`, a tree of them, or of tensors.

    >>> import torch
    >>> old = {"w": torch.ones(1)}
    >>> new = detached(old)
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
