"""Schedules: pure functions from the number of updates so far to a value.

Each takes a Python number and returns one, or takes a 0-d tensor and returns a 0-d float64 tensor of the same value.
`*_interval` are numbers of updates. Warm-up comes before everything else and rises from 0, so the first update with
`warmup_steps > 0` has the rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fts.errors import ScheduleError
from fts.transforms._checks import check_count, check_number, format_value
from fts.transforms._scalars import at_least, at_most, choose, cosine, real
from fts.typing import Schedule


@dataclass(frozen=True, repr=False)
class _Described:
    """A function of the step that can say what it is."""

    function: Callable[[Any], Any]
    description: str

    def __call__(self, step: Any, /) -> Any:
        return self.function(step)

    def __repr__(self) -> str:
        return self.description


def constant_schedule(value: float, *, warmup_steps: int = 0) -> Schedule:
    """The same value at every step, after a warm-up.

    Args:
        value: a finite number.
        warmup_steps: over how many steps the value first rises from 0.

    Returns:
        A schedule.

    Raises:
        ScheduleError: `value` is not finite, or `warmup_steps` no integer of at least 0.

    >>> schedule = constant_schedule(0.1, warmup_steps=2)
    >>> [schedule(step) for step in range(4)]
    [0.0, 0.05, 0.1, 0.1]
    """
    _check_value("constant_schedule: value", value)
    return _warmed(lambda step: value + 0.0 * real(step), f"constant_schedule({format_value(value)}", warmup_steps)


def linear_schedule(init_value: float, end_value: float, transition_steps: int, *, warmup_steps: int = 0) -> Schedule:
    """A straight line from one value to another, which then stays.

    Args:
        init_value: the value at the start of the transition.
        end_value: the value from its end on.
        transition_steps: the length of the transition, which follows the warm-up.
        warmup_steps: over how many steps the value first rises from 0 to `init_value`.

    Returns:
        A schedule.

    Raises:
        ScheduleError: a value is not finite, `transition_steps` no integer of at least 1, or `warmup_steps` none of
            at least 0.

    >>> schedule = linear_schedule(1.0, 0.0, 4, warmup_steps=2)
    >>> [schedule(step) for step in range(8)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check_value("linear_schedule: init_value", init_value)
    _check_value("linear_schedule: end_value", end_value)
    check_count("linear_schedule: transition_steps", transition_steps, low=1, error=ScheduleError)

    def line(step: Any) -> Any:
        done = at_most(at_least(real(step) / transition_steps, 0.0), 1.0)
        return init_value + (end_value - init_value) * done

    words = f"linear_schedule({format_value(init_value)} to {format_value(end_value)} in {transition_steps}"
    return _warmed(line, words, warmup_steps)


def cosine_schedule(
    peak_value: float, *, warmup_steps: int = 0, total_steps: int, end_value: float = 0.0, cycles: float = 0.5
) -> Schedule:
    """A cosine wave between a peak and an end value, after a warm-up.

    Args:
        peak_value: the value at the end of the warm-up.
        warmup_steps: over how many steps the value first rises from 0 to the peak.
        total_steps: the step at which the wave ends; it includes the warm-up.
        end_value: the lowest point of the wave.
        cycles: how many full waves; half of one falls from the peak to `end_value`. What it ends at then stays.

    Returns:
        A schedule.

    Raises:
        ScheduleError: a value is not finite, `cycles` not positive, or not `0 <= warmup_steps <= total_steps`.

    >>> schedule = cosine_schedule(1.0, warmup_steps=2, total_steps=6)
    >>> [round(schedule(step), 3) for step in range(8)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    Source: Loshchilov, Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", eq. 5.
    """
    _check_value("cosine_schedule: peak_value", peak_value)
    _check_value("cosine_schedule: end_value", end_value)
    check_number("cosine_schedule: cycles", cycles, open_low=True, error=ScheduleError)
    _check_total("cosine_schedule", warmup_steps, total_steps)
    descent_steps = max(total_steps - warmup_steps, 1)  # a run may be all warm-up

    def wave(step: Any) -> Any:
        done = at_most(at_least(real(step) / descent_steps, 0.0), 1.0)
        return end_value + (peak_value - end_value) * (0.5 * (1.0 + cosine(2.0 * cycles * math.pi * done)))

    waves = f", {cycles} cycles" if cycles != 0.5 else ""
    words = f"cosine_schedule({_in_words(peak_value, warmup_steps, total_steps, end_value)}{waves})"
    return _Described(_after_warmup(wave, warmup_steps), words)


def cosine_restarts_schedule(
    peak_value: float, *, warmup_steps: int = 0, total_steps: int, end_value: float = 0.0, cycles: float = 1
) -> Schedule:
    """Half a cosine wave from a peak to an end value, several times, after a warm-up.

    Args:
        peak_value: the value at the end of the warm-up and at each restart.
        warmup_steps: over how many steps the value first rises from 0 to the peak.
        total_steps: the step at which the last wave ends; it includes the warm-up.
        end_value: what each wave falls to, and the value from `total_steps` on.
        cycles: how many waves, all of the same length.

    Returns:
        A schedule.

    Raises:
        ScheduleError: a value is not finite, `cycles` not positive, or not `0 <= warmup_steps <= total_steps`.

    >>> schedule = cosine_restarts_schedule(1.0, total_steps=8, cycles=2)
    >>> [round(schedule(step), 3) for step in range(10)]
    [1.0, 0.854, 0.5, 0.146, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    Source: as for `cosine_schedule`.
    """
    _check_value("cosine_restarts_schedule: peak_value", peak_value)
    _check_value("cosine_restarts_schedule: end_value", end_value)
    check_number("cosine_restarts_schedule: cycles", cycles, open_low=True, error=ScheduleError)
    _check_total("cosine_restarts_schedule", warmup_steps, total_steps)
    descent_steps = max(total_steps - warmup_steps, 1)

    def waves(step: Any) -> Any:
        done = real(step) / descent_steps
        wave = 0.5 * (1.0 + cosine(math.pi * ((cycles * done) % 1.0)))
        return choose(done < 1.0, end_value + (peak_value - end_value) * wave, end_value)

    words = f"cosine_restarts_schedule({_in_words(peak_value, warmup_steps, total_steps, end_value)}, {cycles} cycles)"
    return _Described(_after_warmup(waves, warmup_steps), words)


def inverse_sqrt_schedule(peak_value: float, *, warmup_steps: int = 0, timescale: float | None = None) -> Schedule:
    """A fall with the inverse square root of time, after a warm-up: `peak_value * sqrt(timescale / (timescale + step))`.

    Args:
        peak_value: the value at the end of the warm-up.
        warmup_steps: over how many steps the value first rises from 0 to the peak.
        timescale: after so many steps behind the warm-up the value has fallen to `1 / sqrt(2)`; None means the length of
            the warm-up, or 10,000 without one.

    Returns:
        A schedule.

    Raises:
        ScheduleError: `peak_value` is not finite, `timescale` not positive, or `warmup_steps` no integer of at least 0.

    >>> schedule = inverse_sqrt_schedule(1.0, warmup_steps=4)
    >>> [round(schedule(step), 3) for step in (0, 2, 4, 8, 16, 64)]
    [0.0, 0.5, 1.0, 0.707, 0.5, 0.25]

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 3, in the form of Zhai et al. 2022, "Scaling Vision
    Transformers".
    """
    _check_value("inverse_sqrt_schedule: peak_value", peak_value)
    scale = (warmup_steps or 10_000) if timescale is None else timescale
    check_count("inverse_sqrt_schedule: warmup_steps", warmup_steps, error=ScheduleError)
    check_number("inverse_sqrt_schedule: timescale", scale, open_low=True, error=ScheduleError)
    words = f"inverse_sqrt_schedule({format_value(peak_value)}, timescale {scale}"
    return _warmed(lambda step: peak_value / ((real(step) + scale) / scale) ** 0.5, words, warmup_steps)


def warmup_stable_decay_schedule(
    peak_value: float,
    *,
    warmup_steps: int = 0,
    decay_steps: int,
    total_steps: int,
    end_value: float = 0.0,
    init_value: float = 0.0,
    warmup_shape: str = "linear",
    decay_shape: str = "cosine",
    cycles: float = 0.5,
) -> Schedule:
    """A rise, a plateau, and a decay at the end.

    Args:
        peak_value: the value of the plateau.
        warmup_steps: the length of the rise from `init_value` to the peak.
        decay_steps: the length of the decay. Where it would begin within the warm-up, the warm-up is followed first.
        total_steps: the step at which the decay ends; it includes the warm-up and the plateau.
        end_value: the value that the decay tends to, and the value from `total_steps` on.
        init_value: the value at step 0.
        warmup_shape: "linear", "cosine" (half a wave) or "1-sqrt" (`1 - sqrt(1 - progress)`).
        decay_shape: "linear", "cosine" or "1-sqrt" (`1 - sqrt(progress)`).
        cycles: how many full waves a cosine decay has; half of one falls from the peak to `end_value`.

    Returns:
        A schedule.

    Raises:
        ScheduleError: a value is not finite, a number of steps no integer of at least 0, or a shape is none of these.

    >>> schedule = warmup_stable_decay_schedule(1.0, warmup_steps=2, decay_steps=4, total_steps=8, decay_shape="linear")
    >>> [schedule(step) for step in range(10)]
    [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    Source: Hu et al. 2024, "MiniCPM", section 4; the root as in Hägele et al. 2024, "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations".
    """
    where = "warmup_stable_decay_schedule"
    for name, value in (("peak_value", peak_value), ("end_value", end_value), ("init_value", init_value)):
        _check_value(f"{where}: {name}", value)
    for name, count in (("warmup_steps", warmup_steps), ("decay_steps", decay_steps), ("total_steps", total_steps)):
        check_count(f"{where}: {name}", count, error=ScheduleError)
    check_number(f"{where}: cycles", cycles, open_low=True, error=ScheduleError)
    rise, fall = _shape(f"{where}: warmup_shape", warmup_shape, _RISES), _shape(f"{where}: decay_shape", decay_shape, _FALLS)
    decay_start = total_steps - decay_steps

    def stages(step: Any) -> Any:
        step = real(step)
        risen = rise(at_most(step / max(warmup_steps, 1), 1.0))
        left = fall(at_most(at_least((step - decay_start) / max(decay_steps, 1), 0.0), 1.0), cycles)
        falling = choose(step < total_steps, end_value + (peak_value - end_value) * left, end_value)
        later = choose(step < decay_start, peak_value + 0.0 * step, falling)
        return choose(step < warmup_steps, init_value + (peak_value - init_value) * risen, later)

    words = f"{_in_words(peak_value, warmup_steps, total_steps, end_value)}, {decay_shape} decay {decay_steps}"
    return _Described(stages, f"{where}({words})")


def shift_schedule(schedule: Schedule, steps: int) -> Schedule:
    """A schedule that is some steps ahead of another.

    Args:
        schedule: is followed.
        steps: how far ahead: at step 0 the value is `schedule(steps)`.

    Returns:
        A schedule.

    Raises:
        ScheduleError: `steps` is no integer of at least 0, or `schedule` is not callable.

    >>> schedule = shift_schedule(linear_schedule(0.0, 1.0, 4), 1)
    >>> [schedule(step) for step in range(4)]
    [0.25, 0.5, 0.75, 1.0]
    """
    _check_schedule("shift_schedule", schedule)
    check_count("shift_schedule: steps", steps, error=ScheduleError)
    return _Described(lambda step: schedule(step + steps), f"shift_schedule({format_value(schedule)}, {steps})")


def polynomial_schedule(
    init_value: float, end_value: float, power: float, transition_steps: int, *, warmup_steps: int = 0
) -> Schedule:
    """A transition from one value to another that follows `(1 - progress) ** power`; the end value then stays.

    Args:
        init_value: the value at the start of the transition.
        end_value: the value from its end on.
        power: the exponent, a positive number; 1 is a straight line.
        transition_steps: the length of the transition, which follows the warm-up.
        warmup_steps: over how many steps the value first rises from 0 to `init_value`.

    Returns:
        A schedule.

    Raises:
        ScheduleError: a value is not finite, `power` not positive, `transition_steps` no integer of at least 1, or
            `warmup_steps` none of at least 0.

    >>> schedule = polynomial_schedule(1.0, 0.0, 2, 4)
    >>> [schedule(step) for step in range(6)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    _check_value("polynomial_schedule: init_value", init_value)
    _check_value("polynomial_schedule: end_value", end_value)
    check_number("polynomial_schedule: power", power, open_low=True, error=ScheduleError)
    check_count("polynomial_schedule: transition_steps", transition_steps, low=1, error=ScheduleError)

    def curve(step: Any) -> Any:
        left = at_most(at_least(1.0 - real(step) / transition_steps, 0.0), 1.0)
        return end_value + (init_value - end_value) * left**power

    words = f"polynomial_schedule({format_value(init_value)} to {format_value(end_value)}, power {power}, in {transition_steps}"
    return _warmed(curve, words, warmup_steps)


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Rise from 0 to a schedule's first value in a straight line, then follow the schedule from its start.

    Args:
        schedule: starts after the warm-up: it sees the step minus `steps`, and at least 0.
        steps: the length of the warm-up; 0 leaves the schedule as it is.

    Returns:
        A schedule.

    Raises:
        ScheduleError: `steps` is no integer of at least 0, or `schedule` is not callable.

    >>> schedule = warmup(lambda step: 0.5**step, 2)
    >>> [schedule(step) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    _check_schedule("warmup", schedule)
    check_count("warmup: steps", steps, error=ScheduleError)
    return _Described(_after_warmup(schedule, steps), f"warmup({format_value(schedule)}, {steps})")


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Follow one schedule after the other.

    Args:
        schedules: at least one.
        boundaries: the steps at which the second, third, ... schedule takes over: positive and increasing, one
            fewer than there are schedules. Each schedule starts at its own step 0.

    Returns:
        A schedule.

    Raises:
        ScheduleError: there is no schedule, or the boundaries do not fit.

    >>> schedule = join_schedules([lambda step: 1.0, lambda step: 0.5**step], [2])
    >>> [schedule(step) for step in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.25]
    """
    parts, starts = tuple(schedules), (0, *boundaries)
    for part in parts:
        _check_schedule("join_schedules", part)
    if not parts or len(parts) != len(starts):
        raise ScheduleError(
            f"join_schedules: {len(parts)} schedules need {max(len(parts) - 1, 0)} boundaries, not {len(boundaries)}; "
            "at least one schedule is needed."
        )
    for boundary in boundaries:
        check_count("join_schedules: a boundary", boundary, low=1, error=ScheduleError)
    if any(later <= earlier for earlier, later in pairwise(starts)):
        raise ScheduleError(f"join_schedules: the boundaries must increase, not {list(boundaries)}.")

    def joined(step: Any) -> Any:
        value = parts[0](step)
        for part, start in zip(parts[1:], starts[1:], strict=True):
            value = choose(step < start, value, part(at_least(step - start, 0)))
        return value

    words = format_value(parts[0])
    for part, start in zip(parts[1:], starts[1:], strict=True):
        words += f", from {start} {format_value(part)}"
    return _Described(joined, f"join_schedules({words})")


def _warmed(schedule: Callable[[Any], Any], words: str, warmup_steps: int) -> Schedule:
    check_count(f"{words.split('(', maxsplit=1)[0]}: warmup_steps", warmup_steps, error=ScheduleError)
    return _Described(_after_warmup(schedule, warmup_steps), words + (f", warmup {warmup_steps})" if warmup_steps else ")"))


def _after_warmup(schedule: Callable[[Any], Any], steps: int) -> Callable[[Any], Any]:
    if not steps:
        return schedule
    # During the warm-up the schedule stands at its step 0; afterwards the factor is exactly 1.
    return lambda step: schedule(at_least(step - steps, 0)) * at_most(real(step) / steps, 1.0)


def _in_words(peak: float, warmup_steps: int, total_steps: int, end: float) -> str:
    rise = f", warmup {warmup_steps}" if warmup_steps else ""
    return f"{format_value(peak)}{rise}, total {total_steps}{f', end {format_value(end)}' if end else ''}"


_RISES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 * (1.0 - cosine(math.pi * done)),
    "1-sqrt": lambda done: 1.0 - (1.0 - done) ** 0.5,
}
_FALLS: dict[str, Callable[[Any, float], Any]] = {
    "linear": lambda done, cycles: 1.0 - done,
    "cosine": lambda done, cycles: 0.5 * (1.0 + cosine(2.0 * cycles * math.pi * done)),
    "1-sqrt": lambda done, cycles: 1.0 - done**0.5,
}


def _shape(name: str, value: str, shapes: dict[str, Any]) -> Any:
    if value not in shapes:
        raise ScheduleError(f"{name} must be one of {', '.join(map(repr, shapes))}, not {value!r}.")
    return shapes[value]


def _check_total(function: str, warmup_steps: int, total_steps: int) -> None:
    check_count(f"{function}: total_steps", total_steps, low=1, error=ScheduleError)
    check_count(f"{function}: warmup_steps", warmup_steps, error=ScheduleError)
    if warmup_steps > total_steps:
        raise ScheduleError(
            f"{function}: warmup_steps={warmup_steps} is more than total_steps={total_steps}, which includes the warm-up."
        )


def _check_value(name: str, value: Any) -> None:
    check_number(name, value, low=-math.inf, error=ScheduleError)


def _check_schedule(function: str, schedule: Any) -> None:
    if not callable(schedule):
        raise ScheduleError(f"{function} takes schedules (functions of the step), not {schedule!r}; see constant_schedule.")
