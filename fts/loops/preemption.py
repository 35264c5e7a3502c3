"""Stopping between steps: on a signal, at a time limit, or on request of the program."""

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
from fts.loops.timer import Agree, single_process

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What schedulers send before they kill a job, and Ctrl-C."""

MAX_TIME, REQUESTED = 1, 2
"""Codes of a stop without a signal; that of a signal is 128 + its number, as shells report it."""


@attrs.define(eq=False)
class StopRequest:
    """Whether a run should stop. It is polled between steps, so that the current step is completed first.

    Attributes:
        deadline: when to stop, on the clock of `time.monotonic`, in seconds.
        agree: all-reduces the codes of all processes at each poll, so that all stop at the same step. All must poll at the
            same places.
        local_code: of a stop requested in this process; 0 for none.
        code: that all processes agreed on at a poll; 0 as long as the run continues.

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
        """Request a stop, for instance because a budget is spent or a cloud announced preemption."""
        self.local_code = self.local_code or code

    def poll(self) -> bool:
        """Whether to stop now; stays True."""
        if self.code:
            return True
        if not self.local_code and time.monotonic() >= self.deadline:
            self.local_code = MAX_TIME
        code = self.agree(self.local_code)
        if code:
            self.code = code
            logger.warning("Training was asked to stop (%s): it stops after this step.", self.reason)
        return bool(code)

    @property
    def reason(self) -> str | None:
        """Why a poll returned True: the name of a signal, "max_time" or "asked"; None as long as the run continues."""
        return stop_reason(self.code)

    def until(self, iterable: Iterable[Item]) -> Iterator[Item]:
        """The elements, up to and including the one after which a poll returns True.

        >>> request = StopRequest()
        >>> for number in request.until([1, 2, 3]):
        ...     if number == 2:
        ...         request.ask()
        >>> number
        2
        """
        for item in iterable:
            yield item
            if self.poll():
                return


def stop_reason(code: int) -> str | None:
    """The name of a code.

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
    """A context in which signals and a time limit request a stop instead of ending the process.

    The first signal is recorded and the program continues; the loop that polls the request saves and leaves the context. Then
    `Interrupted` is raised, a SystemExit with the status 128 + the signal's number (SIGTERM 143, SIGINT 130, SIGUSR1 138 on
    Linux), so that a launcher can distinguish a run to be resumed from one that is complete. A second signal raises it at once,
    in the middle of the program: complete checkpoints stay complete. A third has the effect that it has without this context.
    A stop at the time limit raises nothing.

    Only signals with Python's default handler are handled: those that the program handles itself, or ignores (as under nohup),
    are left alone. Outside the main thread no signal can be handled, and only the time limit works.

    Args:
        max_time: from now until the stop; see `parse_duration`. Leave time for the last step and a save.
        signals: their names; those that the platform does not have are ignored.
        agree: see `StopRequest`.
        patience: signals within so many seconds of the first are the same request; schedulers often signal a process twice.

    Returns:
        A context manager of a `StopRequest`, for `with_stop` and `StopRequest.until`. It restores the old handlers at its end.

    Raises:
        ArgumentError: a duration or the name of a signal is not valid.
        Interrupted: at the end of the context, after a signal; `KeyboardInterrupted` for SIGINT.

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
    previous = _install(_signal_numbers(signals), SignalHandler(request, patience))
    try:
        yield request
    finally:
        _restore(previous)
    code = max(request.code, request.local_code)  # also of a signal that came after the time limit
    if code > 128:
        raise interruption(code)


def interruption(code: int) -> Interrupted:
    """The exception that ends the process after a signal; for SIGINT it is also a KeyboardInterrupt."""
    kind = KeyboardInterrupted if code == 128 + signal.SIGINT else Interrupted
    return kind(code, stop_reason(code) or "")


@attrs.define(eq=False)
class SignalHandler:
    """The signal handler of `handle_preemption`.

    Attributes:
        request: gets the code of the first signal.
        patience: signals within so many seconds of it are the same request.
        first: when that came, on the clock of `time.monotonic`.
        previous: the handlers to restore, by signal number.
    """

    request: StopRequest
    patience: float
    first: float | None = None
    previous: dict[int, Any] = attrs.field(factory=dict)

    def __call__(self, number: int, frame: Any) -> None:
        # nothing is logged here: a handler may interrupt the logging of the main program
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self.request.local_code = 128 + number  # also after the time limit: a signal is more urgent
        elif now - self.first >= self.patience:
            _restore(self.previous)
            raise interruption(128 + number)


def _signal_numbers(names: Collection[str]) -> list[int]:
    known = {name for name in dir(signal) if re.fullmatch(r"SIG[A-Z0-9]+", name)} | set(SIGNALS)
    wrong = [name for name in names if name not in known]
    if isinstance(names, str) or wrong:
        raise ArgumentError(f'handle_preemption(signals={names!r}): give names of signals, such as ["SIGTERM", "SIGUSR1"].')
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


def _install(numbers: Iterable[int], handler: SignalHandler) -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        logger.debug("No signal is handled: this is not the main thread.")
        return {}
    for number in numbers:
        current = signal.getsignal(number)
        if current not in (signal.SIG_DFL, signal.default_int_handler) and not isinstance(current, SignalHandler):
            logger.debug("%s is left to the handler that the program has: %r.", signal.Signals(number).name, current)
            continue
        handler.previous[number] = current
        signal.signal(number, handler)
    return handler.previous


def _restore(previous: dict[int, Any]) -> None:
    while previous:
        signal.signal(*previous.popitem())


def with_stop(due: Callable[[Counters], Due], request: StopRequest) -> Callable[[Counters], Due]:
    """`due`, and stop on a request: after the step, without a further evaluation, but with the save that is due at a stop.

    A `cadence` that saves at all also saves at a stop.

    Args:
        due: without the request, such as `cadence(log=50, save=500)`.
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

    def due_or_stop(counters: Counters) -> Due:
        wanted = due(counters)
        if not request.poll() and (wanted is NOTHING or not wanted):
            return NOTHING
        return StopTrigger(wanted, request)  # type: ignore[return-value]  # has the attributes of a Due

    return due_or_stop


@attrs.frozen(eq=False)
class StopTrigger:
    """What is due, with a request that may arrive in the meantime: during an evaluation, or a save."""

    wanted: Due
    request: StopRequest

    @property
    def log(self) -> bool:
        """Log."""
        return self.wanted.log

    @property
    def evaluate(self) -> bool:
        """Evaluate, unless a stop is requested."""
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
