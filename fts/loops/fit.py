"""The training loop, as a generator of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs

from fts.errors import ArgumentError, DataError
from fts.loops.cadence import NOTHING, Cadence, Counters, Due, cadence
from fts.loops.events import EpochBegin, EpochEnd, Evaluated, Event, Logged, Saved, StepBegin, StepEnd, Stopped
from fts.loops.metric_accumulator import MetricAccumulator
from fts.loops.position import Position
from fts.loops.source import Source
from fts.loops.source_factory import source

Evaluate: TypeAlias = Callable[[Any], Mapping[str, float] | Iterator[Event]]
Save: TypeAlias = Callable[[Any, Position], Path]


def fit(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    data: Any,
    *,
    total_steps: int | None = None,
    epochs: int | None = None,
    start: Position = Position(),
    due: Callable[[Counters], Due] | None = None,
    evaluate: Evaluate | None = None,
    save: Save | None = None,
    donate: bool = True,
    skip_nonfinite: bool = False,
    accumulator: MetricAccumulator | None = None,
) -> Iterator[Event]:
    """Fold a step over data, as a generator of events; nothing runs until it is iterated.

    The order is, in each epoch, `EpochBegin`, then for each batch `StepBegin`, `StepEnd`, and as due `Logged`,
    `Evaluated`, `Saved`; then `EpochEnd`, and again what is due. `Stopped` is the last event. `due` is called after an
    event was handled, so it may depend on what the consumer decided there.

    Args:
        step: `(state, batch) -> (state, metrics)`. Bind further arguments of a step in a function of the state:
            `lambda state, batch: step(state, batch, tx.averaged_params(state.opt_state))`.
        state: the first state; steps are counted from its `step`. It is consumed if states are donated.
        data: a `source`, or what `source` accepts without further arguments, such as a DataLoader or a list of batches;
            its order then follows from `state.seed`.
        total_steps: stop when this many steps were taken since the state was created, over as many epochs as that needs.
        epochs: stop after this many epochs, counted from epoch 0. With neither, one epoch.
        start: where in the data to begin, such as the position in a checkpoint.
        due: a function `Counters -> Due`. Its answer's `log`, `evaluate`, `save`, `stop` and `end_epoch` are read in this
            order, each right before it is done, so an attribute may change after an evaluation. The default logs every 50
            steps, and evaluates and saves at the end of each epoch where the functions for that are given.
        evaluate: `state -> metrics`, or `state -> events` such as those of `fts.loops.evaluate`, which are yielded here.
        save: `(state, position) -> path`.
        donate: let the step reuse the storage of old states (`fts.steps.with_donation`).
        skip_nonfinite: leave values that are NaN or infinite out of the logged means, unless all are; the steps are not changed.
        accumulator: collects the metrics between two logs; by default a new one. Give one to read its metrics after an error.

    Returns:
        An iterator of events.

    Raises:
        ArgumentError: a limit is not positive, or something is due that no function was given for.
        DataError: an epoch has no batch, or the position is beyond its end.

    >>> import torch
    >>> def step(state, batch):
    ...     return state + batch, {"sum": state + batch}
    >>> events = list(fit(step, torch.tensor(0), [torch.tensor(1), torch.tensor(2)], epochs=1))
    >>> [type(event).__name__ for event in events]
    ['EpochBegin', 'StepBegin', 'StepEnd', 'StepBegin', 'StepEnd', 'EpochEnd', 'Logged', 'Stopped']
    >>> events[-1].state, events[-2].metrics
    (tensor(3), {'sum': 2.0})
    """
    due = due if due is not None else cadence(50, evaluate and "epoch", save and "epoch")
    _check_arguments(total_steps, epochs, start, due, evaluate, save)
    batches = data if isinstance(data, Source) else source(data, seed=state_attribute(state, "seed"))
    if donate:
        from fts.steps import with_donation

        step = with_donation(step)
    accumulator = MetricAccumulator(skip_nonfinite=skip_nonfinite) if accumulator is None else accumulator
    accumulator.check = getattr(step, "check", None)
    if total_steps is None and epochs is None:
        epochs = start.epoch + 1
    return _fit(state, _Loop(step, batches, total_steps, epochs, start, due, evaluate, save, accumulator))


@attrs.frozen
class _Loop:
    """The arguments of `fit`, with their defaults filled in.

    Attributes:
        step: `(state, batch) -> (state, metrics)`.
        data: the source.
        total_steps: a limit on the number of steps.
        epochs: a limit on the number of epochs; one of the limits is given.
        start: where in the data to begin.
        due: `Counters -> Due`.
        evaluate: see `fit`.
        save: see `fit`.
        accumulator: of the metrics between two logs.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    data: Source
    total_steps: int | None
    epochs: int | None
    start: Position
    due: Callable[[Counters], Due]
    evaluate: Evaluate | None
    save: Save | None
    accumulator: MetricAccumulator

    def planned_total(self, step: int) -> int | None:
        """The step at which the run ends as planned; None where that is not known."""
        per_epoch = self.data.steps_per_epoch
        if self.epochs is None or per_epoch is None:
            return self.total_steps
        by_epochs = step + max(0, (self.epochs - self.start.epoch) * per_epoch - self.start.batch)
        return by_epochs if self.total_steps is None else min(self.total_steps, by_epochs)

    def stop_reason(self, step: int, epoch: int) -> Literal["total_steps", "epochs", "due"] | None:
        """The limit that is reached; None as long as neither is."""
        if self.total_steps is not None and step >= self.total_steps:
            return "total_steps"
        return "epochs" if self.epochs is not None and epoch >= self.epochs else None


def _fit(state: Any, loop: _Loop) -> Iterator[Event]:
    step_fn, data, due, accumulator = loop.step, loop.data, loop.due, loop.accumulator  # locals: this is the hot loop
    per_epoch = data.steps_per_epoch
    step, epoch, batch_number = int(state_attribute(state, "step")), loop.start.epoch, loop.start.batch
    planned = loop.planned_total(step)
    counters = Counters(step, epoch, batch_number, planned, per_epoch)
    reason = loop.stop_reason(step, epoch)

    if reason is not None:  # a completed run was resumed: nothing is left to do
        yield Stopped(counters, state, reason)
        return
    while reason is None:
        yield EpochBegin(counters, state)
        ended = complete = False
        for batch in data.epoch(epoch, batch_number):
            yield StepBegin(counters, state, batch)
            state, metrics = step_fn(state, batch)
            step += 1
            batch_number += 1
            accumulator.add(metrics)
            counters = Counters(step, epoch, batch_number, planned, per_epoch)
            yield StepEnd(counters, state, metrics)
            wanted = due(counters)
            if wanted is not NOTHING and wanted:
                yield from _perform(wanted, counters, state, loop)
                ended = wanted.stop or wanted.end_epoch
                reason = "due" if wanted.stop else None
            if step == loop.total_steps:
                reason = "total_steps"
            if reason is not None or ended:
                complete = batch_number == per_epoch
                break
        else:
            complete = True
            if batch_number == 0:  # at any other position an epoch may be over
                raise DataError(data.describe_empty(epoch))
        yield EpochEnd(counters, state, complete)
        if reason is None or (complete and reason != "due"):
            epoch, batch_number = epoch + 1, 0
            counters = Counters(step, epoch, 0, planned, per_epoch, "epoch")
            wanted = due(counters)
            yield from _perform(wanted, counters, state, loop)
            reason = reason or ("due" if wanted.stop else loop.stop_reason(step, epoch))
            counters = attrs.evolve(counters, moment="step")
    counters = attrs.evolve(counters, moment="stop" if reason == "due" else "end")
    yield from _perform(due(counters), counters, state, loop)
    yield Stopped(counters, state, reason)


def _perform(due: Due, counters: Counters, state: Any, loop: _Loop) -> Iterator[Event]:
    if due.log:
        means, last, steps = loop.accumulator.read()
        if steps:
            yield Logged(counters, means, last, steps)
    if due.evaluate:
        yield from _evaluate(loop.evaluate, state, counters)
    if due.save:
        yield _save(loop.save, state, counters)


def _check_arguments(
    total_steps: int | None,
    epochs: int | None,
    start: Position,
    due: Callable[[Counters], Due],
    evaluate: Evaluate | None,
    save: Save | None,
) -> None:
    for name, limit in (("total_steps", total_steps), ("epochs", epochs)):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ArgumentError(f"fit({name}={limit!r}) must be a whole number of at least 0, or None for no limit.")
    if start.epoch < 0 or start.batch < 0:
        raise ArgumentError(f"fit(start={start}) must not be negative.")
    if isinstance(due, Cadence):  # it is known what will be due, so this is an error before the first step
        for name, every, function in (("evaluate", due.evaluate, evaluate), ("save", due.save, save)):
            if every is not None and function is None:
                raise _missing(name)


def _missing(name: str) -> ArgumentError:
    return ArgumentError(f"{name} is due, but fit has no function for it. Give fit(..., {name}=...), or make it never due.")


def _evaluate(evaluate: Evaluate | None, state: Any, counters: Counters) -> Iterator[Event]:
    if evaluate is None:
        raise _missing("evaluate")
    result = evaluate(state)
    if isinstance(result, Mapping):
        yield Evaluated(counters, dict(result))
        return
    for event in result:
        yield attrs.evolve(event, counters=counters)


def _save(save: Save | None, state: Any, counters: Counters) -> Saved:
    if save is None:
        raise _missing("save")
    return Saved(counters, save(state, counters.position))


def state_attribute(state: Any, name: str) -> Any:
    """`state.step` or `state.seed`; of a tuple or dict of states (as for a GAN) that of the first; otherwise 0."""
    if hasattr(state, name):
        return getattr(state, name)
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, (tuple, list)) else ()
    return next((getattr(part, name) for part in parts if hasattr(part, name)), 0)
