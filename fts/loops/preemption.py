"""Stopping well: by a signal, by the clock, or because the program asks for it."""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import attrs

from fts.errors import ArgumentError, Interrupted, KeyboardInterrupted
from fts.loops.cadence import NOTHING, Counters, Due
from fts.loops.durations import parse_duration
from fts.loops.timer import (Agree, single_process)

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What schedulers send before they kill, and Ctrl-C."""

MAX_TIME, REQUESTED = 1, 2
"""Codes of a stop that no signal asked for; that of a signal is 128 + its number, as shells report it."""


@attrs.define(eq=False)
class StopRequest:
    """Whether a run should stop. It is polled between steps, so that what is under way is finished first.

    Attributes:
        deadline: when to stop, on the clock of `time.monotonic`, in seconds.
        agree: combines the codes of all processes at each poll, so that all stop at the same step. Every process
            must poll at the same places.
        local_code: the code of what was asked of this process; 0 for nothing.
        code: the code that a poll found; 0 as long as the run goes on.

    >>> request = StopRequest()
    >>> request.poll(), request.reason
    (False, None)
    >>> request.ask()
    >>> request.poll(), request.reason
    (True, 'asked')
    """

    deadline: float = math.inf
    agree: Agree = single_process
    local_code: int = 0
    code: int = 0

    def ask(self, code: int = REQUESTED) -> None:
        """Ask the run to stop, for a reason of your own: a budget that is spent, a notice of the cloud's."""
        self.local_code = self.local_code or code

    def poll(self) -> bool:
        """Whether to stop now; the answer stays True."""
        if self.code:
            return True
        if not self.local_code and time.monotonic() >= self.deadline:
            self.local_code = MAX_TIME
        code = self.agree(self.local_code)
        if code:
            self.code = code
            logger.warning("Training is asked to stop (%s): it stops after this step.", self.reason)
        return bool(code)

    @property
    def reason(self) -> str | None:
        """What a poll found: the name of a signal, "max_time" or "asked"; None as long as the run goes on."""
        return stop_reason(self.code)

    def until(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, up to and with the one after which a poll says stop.

        >>> request = StopRequest()
        >>> for number in request.until([1, 2, 3]):
        ...     if number == 2:
        ...         request.ask()
        >>> number
        2
        """
        for item in items:
            yield item
            if self.poll():
                return


def stop_reason(code: int) -> str | None:
    """A code in words.

    >>> stop_reason(143), stop_reason(0)
    ('SIGTERM', None)
    """
    if code > 128:
        return signal.Signals(code - 128).name
    return {0: None, MAX_TIME: "max_time"}.get(code, "asked")


@contextmanager
def handle_preemption(
    *,
    max_time: float | str | timedelta | None = None,
    signals: Collection[str] = SIGNALS,
    agree: Agree = single_process,
    patience: float = 1.0,
) -> Iterator[StopRequest]:
    """A block in which signals and a time limit ask for a stop instead of ending the process.

    The first signal is noted and the block goes on; whoever polls the request saves and leaves the block. Then `Interrupted`
    is raised, a SystemExit with the status 128 + the signal's number (SIGTERM 143, SIGINT 130, SIGUSR1 138 on Linux), so that
    a launcher can tell a run to be resumed from one that is complete. A second signal raises it at once, where the program is:
    checkpoints that were complete stay so. A third does what it would have done without this. A stop by the clock raises
    nothing.

    Only signals whose handling is Python's default are taken over: what the program handles itself, or ignores (as under
    nohup), stays so. Outside the main thread no signal can be handled, and only the clock asks.

    Args:
        max_time: when to ask, counted from here: seconds, or as `parse_duration` reads it. Leave time for the last step and a save.
        signals: their names; those that the platform does not have are left out.
        agree: see `StopRequest`.
        patience: signals within so many seconds of the first are the same request; schedulers often reach a process twice.

    Returns:
        A context that gives a `StopRequest`, for `with_stop` and for `StopRequest.until`. At its end the old handlers are back.

    Raises:
        ArgumentError: a time or the name of a signal cannot be read.
        Interrupted: at the end of the block, if a signal came; `KeyboardInterrupted` for SIGINT.

    >>> from fts import loops
    >>> def step(state, batch):
    ...     return state + batch, {}
    >>> with handle_preemption(max_time="2h30m") as request:
    ...     request.ask()
    ...     *_, last = loops.fit(step, 0, [1, 2], due=with_stop(loops.cadence(), request))
    >>> last.state, last.reason, request.reason
    (1, 'due', 'asked')
    """
    deadline = math.inf if max_time is None else time.monotonic() + parse_duration(max_time)
    request = StopRequest(deadline, agree)
    taken = _take_over(_numbers(signals), SignalHandler(request, patience))
    try:
        yield request
    finally:
        _restore(taken)
    code = max(request.code, request.local_code)  # also of a signal that came after the clock had asked
    if code > 128:
        raise interruption(code)


def interruption(code: int) -> Interrupted:
    """The exception that leaves the process after a signal; for SIGINT it is a KeyboardInterrupt, too."""
    kind = KeyboardInterrupted if code == 128 + signal.SIGINT else Interrupted
    return kind(code, stop_reason(code) or "")


@attrs.define(eq=False)
class SignalHandler:
    """What a signal does inside `handle_preemption`.

    Attributes:
        request: is asked by the first signal.
        patience: signals within so many seconds of it are the same request.
        first: when it came, on the clock of `time.monotonic`.
        taken: the handlers that were there before.
    """

    request: StopRequest
    patience: float
    first: float | None = None
    taken: dict[int, Any] = attrs.field(factory=dict)

    def __call__(self, number: int, frame: Any) -> None:
        # nothing is logged here: a handler may interrupt the logging of the main program
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self.request.local_code = 128 + number  # also where the clock had asked: a signal is more urgent
        elif now - self.first >= self.patience:
            _restore(self.taken)
            raise interruption(128 + number)


def _numbers(names: Collection[str]) -> list[int]:
    known = {name for name in dir(signal) if re.fullmatch(r"SIG[A-Z0-9]+", name)} | set(SIGNALS)
    wrong = [name for name in names if name not in known]
    if isinstance(names, str) or wrong:
        raise ArgumentError(f'interruptible(signals={names!r}): give names of signals, such as ["SIGTERM", "SIGUSR1"].')
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


def _take_over(numbers: Iterable[int], handler: SignalHandler) -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        logger.debug("No signal is handled: this is not the main thread.")
        return {}
    for number in numbers:
        current = signal.getsignal(number)
        if current not in (signal.SIG_DFL, signal.default_int_handler) and not isinstance(current, SignalHandler):
            logger.debug("%s is left to the handler that the program has: %r.", signal.Signals(number).name, current)
            continue
        handler.taken[number] = current
        signal.signal(number, handler)
    return handler.taken


def _restore(taken: dict[int, Any]) -> None:
    while taken:
        signal.signal(*taken.popitem())


def with_stop(due: Callable[[Counters], Due], request: StopRequest) -> Callable[[Counters], Due]:
    """`due`, and stop where a request says so: after the step, without a further evaluation, but with what `due` saves at a stop.

    A `cadence` that saves at all also saves at a stop.

    Args:
        due: what else is due, such as `cadence(log=50, save=500)`.
        request: is polled after each step.

    Returns:
        A function `Counters -> Due`, for `fit`.

    >>> from fts import loops
    >>> request = StopRequest()
    >>> due = with_stop(loops.cadence(evaluate=1), request)
    >>> at = Counters(step=1)
    >>> due(at).evaluate, due(at).stop
    (True, False)
    >>> request.ask()
    >>> due(at).evaluate, due(at).stop
    (False, True)
    """

    def asked(counters: Counters) -> Due:
        wanted = due(counters)
        if not request.poll() and (wanted is NOTHING or not wanted):
            return NOTHING
        return StopTrigger(wanted, request)  # type: ignore[return-value]  # has the attributes of a Due

    return asked


@attrs.frozen(eq=False)
class StopTrigger:
    """What is due, with a request that may come while it is done: during an evaluation, or a save."""

    wanted: Due
    request: StopRequest

    @property
    def log(self) -> bool:
        """Log."""
        return self.wanted.log

    @property
    def evaluate(self) -> bool:
        """Evaluate, unless asked to stop."""
        return self.wanted.evaluate and not self.request.poll()

    @property
    def save(self) -> bool:
        """Write a checkpoint."""
        return self.wanted.save

    @property
    def stop(self) -> bool:
        """End the run."""
        return self.request.poll() or self.wanted.stop

    @property
    def end_epoch(self) -> bool:
        """End the epoch."""
        return self.wanted.end_epoch
