"""When to log, evaluate, save and stop: functions of the counters, and of a clock where an interval is one of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, TypeAlias

import attrs

from fts.errors import ArgumentError
from fts.loops.position import Position
from fts.loops.timer import Agree, Clock, Timer, every_interval, single_process

Moment: TypeAlias = Literal["step", "epoch", "end", "stop"]
"""When `due` is called: after a step, after a complete epoch, at the planned end, or where the run stops early."""

Every: TypeAlias = int | str | timedelta | None
"""Every so many steps, at the end of each "epoch", by time ("20min", a timedelta), or never."""


@attrs.frozen
class Counters:
    """The progress of a run. All are Python integers that the loop counts itself: reading one never waits for a device.

    Attributes:
        step: how many steps were taken since the state was created.
        epoch: the pass over the data, from 0.
        batch: how many of the steps' batches were consumed in this epoch.
        total_steps: the step at which the run ends as planned; None where that is not known.
        steps_per_epoch: None where the data has no length.
        moment: "step"; "epoch" when a complete epoch has just ended (`epoch` and `batch` then name the next one's first batch);
            "end" or "stop" when the run is over, as planned or early.

    >>> Counters(step=12, epoch=1, batch=2, steps_per_epoch=10).progress
    1.2
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    moment: Moment = "step"

    @property
    def position(self) -> Position:
        """The position of the next batch: where to resume from."""
        return Position(self.epoch, self.batch)

    @property
    def progress(self) -> float | None:
        """Epochs completed, with the fraction of the current one; None in the middle of an epoch of unknown length."""
        if self.batch == 0:
            return float(self.epoch)
        return self.epoch + self.batch / self.steps_per_epoch if self.steps_per_epoch else None


@attrs.frozen
class Due:
    """What the loop does next, in this order: log, evaluate, save, then end the epoch or stop."""

    log: bool = False
    evaluate: bool = False
    save: bool = False
    stop: bool = False
    end_epoch: bool = False

    def __bool__(self) -> bool:
        return self.log or self.evaluate or self.save or self.stop or self.end_epoch


NOTHING = Due()


@attrs.define(eq=False)
class ByTime:
    """Due at the first step after an interval of time; the interval restarts there.

    Attributes:
        timer: of the interval.
        step: the step at which it was last due.
    """

    timer: Timer
    step: int | None = None

    def __call__(self, counters: Counters) -> bool:
        """Whether it is due; if so, the interval restarts."""
        at_end = counters.moment in ("end", "stop")
        due = counters.step != self.step if at_end else counters.moment == "step" and self.timer.due()
        if due:
            self.step = counters.step
            self.timer.reset()
        return due


Pace: TypeAlias = int | Literal["epoch"] | ByTime | None
"""A parsed `Every`."""


@attrs.frozen
class Cadence:
    """A function from `Counters` to `Due`; made by `cadence`."""

    log: Pace = None
    evaluate: Pace = None
    save: Pace = None
    stop: Callable[[Counters], bool] | None = None

    def __call__(self, counters: Counters) -> Due:
        log, evaluate, save = _due(self.log, counters), _due(self.evaluate, counters), _due(self.save, counters)
        if counters.moment == "stop":
            evaluate = False  # a run that is asked to stop should stop soon
        stop = self.stop is not None and self.stop(counters)
        return Due(log, evaluate, save, stop) if log or evaluate or save or stop else NOTHING


def cadence(
    log: Every = None,
    evaluate: Every = None,
    save: Every = None,
    stop: Callable[[Counters], bool] | None = None,
    *,
    clock: Clock = time.monotonic,
    agree: Agree = single_process,
) -> Cadence:
    """Regular logging, evaluation and saving, each at its own interval.

    Each is due every so many steps, counted from the start of training and not of this run; at the end of each epoch; or at
    the first step after an interval of time, counted from now and then from the last time that it was due. Each that is not
    None is also due at the end of the run, if it was not due at the last step: so the last steps' metrics are logged and the
    last state is saved. A run that is stopped early logs and saves, but does not evaluate.

    Args:
        log: steps between two logs, "epoch", a time such as "20min" or a `timedelta`, or None for never.
        evaluate: the same for evaluations.
        save: the same for checkpoints.
        stop: called after each step; True ends the run.
        clock: gives the time in seconds, for intervals of time.
        agree: all-reduces whether such an interval is over, as in `Timer`.

    Returns:
        A function `Counters -> Due`: pure, except for the clock.

    Raises:
        ArgumentError: an interval is not a positive number of steps, nor "epoch" or a length of time.

    >>> due = cadence(log=10, save="epoch")
    >>> due(Counters(step=20, epoch=0, batch=20)).log, due(Counters(step=21, epoch=0, batch=21)).log
    (True, False)
    >>> now = 0.0
    >>> due = cadence(save="20min", clock=lambda: now)
    >>> now = 1500.0
    >>> due(Counters(step=7)).save, due(Counters(step=8)).save
    (True, False)
    """

    def pace(name: str, every: Every) -> Pace:
        return _pace(name, every, clock, agree)

    return Cadence(pace("log", log), pace("evaluate", evaluate), pace("save", save), stop)


def _pace(name: str, every: Every, clock: Clock, agree: Agree) -> Pace:
    if every is None or every == "epoch":
        return every  # type: ignore[return-value]  # mypy does not narrow a str to its literal
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return every
    if isinstance(every, (str, timedelta)):
        try:
            return ByTime(every_interval(every, clock=clock, agree=agree))
        except ArgumentError as error:
            raise _not_an_interval(name, every) from error
    raise _not_an_interval(name, every)


def _not_an_interval(name: str, every: object) -> ArgumentError:
    return ArgumentError(
        f'cadence({name}={every!r}) must be a positive number of steps, "epoch", a length of time such as "20min", or None for '
        "never."
    )


def _due(every: Pace, counters: Counters) -> bool:
    if every is None:
        return False
    if isinstance(every, ByTime):
        return every(counters)
    if every == "epoch":
        # at the end, `batch` is 0 if the epoch was complete, and then it was due at the epoch's end
        return counters.moment == "epoch" or (counters.moment in ("end", "stop") and counters.batch != 0)
    hit = counters.step % every == 0
    return hit if counters.moment == "step" else not hit and counters.moment != "epoch"
