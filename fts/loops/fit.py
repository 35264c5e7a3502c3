"""The loop: many steps, told as events."""

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
from fts.loops.source import Source, source

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
    window: MetricAccumulator | None = None,
) -> Iterator[Event]:
    """Fold a step over data and tell what happens, as a generator of events; nothing runs until it is iterated.

    The order is, in each epoch, `EpochBegin`, then for each batch `StepBegin`, `StepEnd`, and as due `Logged`,
    `Evaluated`, `Saved`; then `EpochEnd`, and again what is due. `Stopped` is the last event. `due` is asked after an
    event was handled, so it may depend on what the consumer decided there.

    Args:
        step: `(state, batch) -> (state, metrics)`. What else a step needs, a function of the state gives it:
            `lambda state, batch: step(state, batch, tx.averaged_params(state.opt_state))`.
        state: the first state; its `step` is where counting starts. It is consumed if states are donated.
        data: a `source`, or what `source` accepts without further arguments, such as a DataLoader or a list of batches;
            its order then follows from `state.seed`.
        total_steps: stop when this many steps were taken since the state was created, over as many epochs as that needs.
        epochs: stop after this many epochs, counted from epoch 0. With neither, one epoch.
        start: where in the data to begin, such as the position that a checkpoint holds.
        due: a function `Counters -> Due`. Its answer's `log`, `evaluate`, `save`, `stop` and `end_epoch` are read in this
            order, each when its turn comes, so an answer may change its mind after an evaluation. The default logs every 50
            steps, and evaluates and saves at the end of each epoch where the functions for that are given.
        evaluate: `state -> metrics`, or `state -> events` such as those of `fts.loops.evaluation`, which are passed on.
        save: `(state, position) -> path`.
        donate: let the step reuse the storage of old states (`fts.steps.with_donation`).
        skip_nonfinite: leave values that are NaN or infinite out of the logged means, unless all are; the steps are not changed.
        window: collects the metrics between two logs; by default one that nobody else reads, so that those of an error are lost.

    Returns:
        An iterator of events.

    Raises:
        ArgumentError: a limit is not positive, or something is due that no function was given for.
        DataError: an epoch holds no batch, or the position lies beyond its end.

    >>> import torch
    >>> def step(state, batch):
    ...     return state + batch, {"sum": state + batch}
    >>> events = list(fit(step, torch.tensor(0), [torch.tensor(1), torch.tensor(2)], epochs=1))
    >>> [type(event).__name__ for event in events]
    ['EpochBegin', 'StepBegin', 'StepEnd', 'StepBegin', 'StepEnd', 'EpochEnd', 'Logged', 'Stopped']
    >>> events[-1].state, events[-2].metrics
    (tensor(3), {'sum': 2.0})
    """
    plan = due if due is not None else cadence(50, evaluate and "epoch", save and "epoch")
    _check_arguments(total_steps, epochs, start, plan, evaluate, save)
    batches = data if isinstance(data, Source) else source(data, seed=attribute_of(state, "seed"))
    if donate:
        from fts.steps import with_donation

        step = with_donation(step)
    window = MetricAccumulator(skip_nonfinite=skip_nonfinite) if window is None else window
    window.check = getattr(step, "check", None)
    return _fit(step, state, batches, total_steps, epochs, start, plan, evaluate, save, window)


def _fit(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    data: Source,
    total_steps: int | None,
    epochs: int | None,
    start: Position,
    due: Callable[[Counters], Due],
    evaluate: Evaluate | None,
    save: Save | None,
    window: MetricAccumulator,
) -> Iterator[Event]:
    if total_steps is None and epochs is None:
        epochs = start.epoch + 1
    per_epoch = data.steps_per_epoch
    number, epoch, batch_number = int(attribute_of(state, "step")), start.epoch, start.batch
    planned = _planned_total(number, start, total_steps, epochs, per_epoch)
    counters = Counters(number, epoch, batch_number, planned, per_epoch)
    reason = _reason(number, epoch, total_steps, epochs)

    if reason is not None:  # a finished run was resumed: nothing is left to do
        yield Stopped(counters, state, reason)
        return
    while reason is None:
        yield EpochBegin(counters, state)
        ended = complete = False
        for batch in data.epoch(epoch, batch_number):
            yield StepBegin(counters, state, batch)
            state, metrics = step(state, batch)
            number += 1
            batch_number += 1
            window.add(metrics)
            counters = Counters(number, epoch, batch_number, planned, per_epoch)
            yield StepEnd(counters, state, metrics)
            wanted = due(counters)
            if wanted is not NOTHING and wanted:
                yield from _perform(wanted, counters, state, window, evaluate, save)
                ended = wanted.stop or wanted.end_epoch
                reason = "due" if wanted.stop else None
            if number == total_steps:
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
            counters = Counters(number, epoch, 0, planned, per_epoch, "epoch")
            wanted = due(counters)
            yield from _perform(wanted, counters, state, window, evaluate, save)
            reason = reason or ("due" if wanted.stop else _reason(number, epoch, total_steps, epochs))
            counters = attrs.evolve(counters, moment="step")
    counters = attrs.evolve(counters, moment="stop" if reason == "due" else "end")
    yield from _perform(due(counters), counters, state, window, evaluate, save)
    yield Stopped(counters, state, reason)


def _perform(
    due: Due, at: Counters, state: Any, window: MetricAccumulator, evaluate: Evaluate | None, save: Save | None
) -> Iterator[Event]:
    if due.log:
        means, last, steps = window.read()
        if steps:
            yield Logged(at, means, last, steps)
    if due.evaluate:
        yield from _evaluated(evaluate, state, at)
    if due.save:
        yield _saved(save, state, at)


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
    if isinstance(due, Cadence):  # what will be due is known, so say it before the first step
        for name, every, function in (("evaluate", due.evaluate, evaluate), ("save", due.save, save)):
            if every is not None and function is None:
                raise _missing(name)


def _missing(name: str) -> ArgumentError:
    return ArgumentError(f"{name} is due, but fit was given no function for it. Pass fit(..., {name}=...), or make it never due.")


def _evaluated(evaluate: Evaluate | None, state: Any, at: Counters) -> Iterator[Event]:
    if evaluate is None:
        raise _missing("evaluate")
    result = evaluate(state)
    if isinstance(result, Mapping):
        yield Evaluated(at, dict(result))
        return
    for event in result:
        yield attrs.evolve(event, counters=at)


def _saved(save: Save | None, state: Any, at: Counters) -> Saved:
    if save is None:
        raise _missing("save")
    return Saved(at, save(state, at.position))


def _planned_total(
    number: int, start: Position, total_steps: int | None, epochs: int | None, per_epoch: int | None
) -> int | None:
    if epochs is None or per_epoch is None:
        return total_steps
    by_epochs = number + max(0, (epochs - start.epoch) * per_epoch - start.batch)
    return by_epochs if total_steps is None else min(total_steps, by_epochs)


def _reason(
    number: int, epoch: int, total_steps: int | None, epochs: int | None
) -> Literal["total_steps", "epochs", "due"] | None:
    if total_steps is not None and number >= total_steps:
        return "total_steps"
    return "epochs" if epochs is not None and epoch >= epochs else None


def attribute_of(state: Any, name: str) -> Any:
    """`state.step` or `state.seed`; of a tuple or dict of states (as for a GAN) that of the first; else 0."""
    if hasattr(state, name):
        return getattr(state, name)
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, (tuple, list)) else ()
    return next((getattr(part, name) for part in parts if hasattr(part, name)), 0)
