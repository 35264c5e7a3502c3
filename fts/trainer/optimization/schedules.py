"""Learning rate schedules by `lr_scheduler_type` and `lr_scheduler_kwargs`, and rules that follow a metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import attrs

from fts import transforms as tx
from fts.errors import ArgumentError, FtsError
from fts.trainer.arguments import SchedulerType, TrainingArguments, check_float
from fts.typing import Schedule


def make_schedule(args: TrainingArguments, total: int, warmup: int) -> Schedule:
    """The learning rate as a function of the updates applied before, as transformers' `get_scheduler` makes it.

    Args:
        args: `learning_rate`, `lr_scheduler_type` and `lr_scheduler_kwargs`.
        total: updates in the run.
        warmup: updates of warm-up. Where a metric decides the rate, there is none.

    Returns:
        A schedule; the constant first rate where a metric decides (see `make_metric_rule`).

    Raises:
        ArgumentError: `lr_scheduler_kwargs` has a key that the schedule does not take, lacks one, or has a bad value.

    >>> args = TrainingArguments(learning_rate=1.0, lr_scheduler_type="linear")
    >>> schedule = make_schedule(args, total=6, warmup=2)
    >>> [schedule(step) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    kind, options = SchedulerType(args.lr_scheduler_type), scheduler_kwargs(args)
    make, taken = _SCHEDULES[kind]
    _check_keys(args, options, taken)
    try:
        return make(_RateInputs(args.learning_rate, total, warmup), **options)
    except FtsError as error:
        raise ArgumentError(f"lr_scheduler_type='{kind}' with lr_scheduler_kwargs={options} cannot work: {error}") from error


def make_metric_rule(args: TrainingArguments) -> tx.RateRule | None:
    """How the metric of evaluations changes the learning rate, where `lr_scheduler_type` names such a rule.

    Args:
        args: `lr_scheduler_type` and `lr_scheduler_kwargs`, which are those of torch's `ReduceLROnPlateau`, or of
            transformers' `GreedyLR`.

    Returns:
        A rule for `tx.reduce_on_plateau` and `tx.update_on_metric`; None where the rate is a function of the step.

    Raises:
        ArgumentError: `lr_scheduler_kwargs` has a key that the rule does not take, or a bad value.

    >>> args = TrainingArguments(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    >>> make_metric_rule(args).patience
    10
    """
    rule = _METRIC_RULES.get(SchedulerType(args.lr_scheduler_type))
    if rule is None:
        return None
    options = scheduler_kwargs(args)
    _check_keys(args, options, _field_names(rule))
    if options.pop("verbose", False):
        raise ArgumentError("lr_scheduler_kwargs: verbose=True has no effect: each log has the learning_rate. Leave it out.")
    for name in ("min_lr", "max_lr"):
        if isinstance(options.get(name), (list, tuple)):
            options[name] = _one_value(name, options[name])
    try:
        made: tx.RateRule = rule(**options)
    except FtsError as error:
        raise ArgumentError(f"lr_scheduler_kwargs={options} cannot work: {error}") from error
    return made


def scheduler_kwargs(args: TrainingArguments) -> dict[str, Any]:
    """`lr_scheduler_kwargs`; a text became a dictionary when it was set."""
    return dict(args.lr_scheduler_kwargs) if isinstance(args.lr_scheduler_kwargs, dict) else {}


def _check_keys(args: TrainingArguments, options: dict[str, Any], taken: tuple[str, ...]) -> None:
    unknown = [key for key in options if key not in taken]
    if unknown:
        takes = f"takes {', '.join(taken)}" if taken else "takes none"
        raise ArgumentError(
            f"lr_scheduler_kwargs has {unknown[0]!r}={options[unknown[0]]!r}, but "
            f"lr_scheduler_type='{args.lr_scheduler_type}' {takes}."
        )


@attrs.frozen
class _RateInputs:
    """What every schedule is made of: the peak rate, the updates in the run, and those of warm-up."""

    peak: float
    total: int
    warmup: int


def _linear(run: _RateInputs) -> Schedule:
    if run.warmup >= run.total:  # the warm-up is truncated, and there is no decay
        rise = tx.linear_schedule(0.0, run.peak, run.warmup)
        return tx.join_schedules([rise, tx.constant_schedule(0.0)], [run.warmup])
    return tx.linear_schedule(run.peak, 0.0, run.total - run.warmup, warmup_steps=run.warmup)


def _cosine(run: _RateInputs, *, num_cycles: float = 0.5) -> Schedule:
    return tx.cosine_schedule(run.peak, warmup_steps=run.warmup, total_steps=max(run.total, run.warmup), cycles=num_cycles)


def _cosine_with_restarts(run: _RateInputs, *, num_cycles: float = 1) -> Schedule:
    return tx.cosine_restarts_schedule(
        run.peak, warmup_steps=run.warmup, total_steps=max(run.total, run.warmup), cycles=num_cycles
    )


def _polynomial(run: _RateInputs, *, lr_end: float = 1e-7, power: float = 1.0) -> Schedule:
    check_float("lr_end", lr_end)
    if lr_end >= run.peak:
        raise ArgumentError(f"lr_end={lr_end!r} must be below learning_rate={run.peak!r}.")
    return tx.polynomial_schedule(run.peak, lr_end, power, max(run.total - run.warmup, 1), warmup_steps=run.warmup)


def _constant(run: _RateInputs) -> Schedule:
    return tx.constant_schedule(run.peak)


def _constant_with_warmup(run: _RateInputs) -> Schedule:
    return tx.constant_schedule(run.peak, warmup_steps=run.warmup)


def _inverse_sqrt(run: _RateInputs, *, timescale: float | None = None) -> Schedule:
    return tx.inverse_sqrt_schedule(run.peak, warmup_steps=run.warmup, timescale=timescale)


def _cosine_with_min_lr(
    run: _RateInputs,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> Schedule:
    end = _min_lr(run.peak, min_lr, min_lr_rate)
    return tx.cosine_schedule(
        run.peak, warmup_steps=run.warmup, total_steps=max(run.total, run.warmup), end_value=end, cycles=num_cycles
    )


def _cosine_warmup_with_min_lr(
    run: _RateInputs,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> Schedule:
    # One step ahead of the cosine, so that the first update has a rate; the cosine is one step longer.
    left = max(run.total - run.warmup, 1)
    check_float("num_cycles", num_cycles, open_low=True)
    wave: dict[str, Any] = {"end_value": _min_lr(run.peak, min_lr, min_lr_rate), "cycles": num_cycles * (left + 1) / left}
    if warmup_lr_rate is None or not run.warmup:
        return tx.shift_schedule(
            tx.cosine_schedule(run.peak, warmup_steps=run.warmup, total_steps=run.warmup + left + 1, **wave), 1
        )
    check_float("warmup_lr_rate", warmup_lr_rate)
    rise = tx.linear_schedule(warmup_lr_rate * run.peak, run.peak, max(run.warmup - 1, 1))
    return tx.join_schedules(
        [rise, tx.shift_schedule(tx.cosine_schedule(run.peak, total_steps=left + 1, **wave), 1)], [run.warmup]
    )


def _warmup_stable_decay(
    run: _RateInputs,
    *,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    if num_decay_steps is None:
        raise ArgumentError("num_decay_steps is missing: over how many updates the rate falls at the end.")
    check_float("min_lr_ratio", min_lr_ratio)
    return tx.warmup_stable_decay_schedule(
        run.peak,
        warmup_steps=run.warmup,
        decay_steps=num_decay_steps,
        total_steps=run.total if num_stable_steps is None else run.warmup + num_stable_steps + num_decay_steps,
        end_value=min_lr_ratio * run.peak,
        init_value=min_lr_ratio * run.peak,
        warmup_shape=warmup_type,
        decay_shape=decay_type,
        cycles=num_cycles,
    )


def _min_lr(peak: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    if (min_lr is None) == (min_lr_rate is None):
        given = "neither" if min_lr is None else "both"
        raise ArgumentError(f"it needs min_lr (a rate) or min_lr_rate (a share of learning_rate), and {given} was given.")
    name, value, unit = ("min_lr", min_lr, 1.0) if min_lr_rate is None else ("min_lr_rate", min_lr_rate, peak)
    check_float(name, value)
    return float(value or 0.0) * unit


def _field_names(rule: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(rule)) + (("verbose",) if rule is tx.Greedy else ())


def _one_value(name: str, values: Any) -> Any:
    if len(set(values)) != 1:
        raise ArgumentError(f"lr_scheduler_kwargs: {name}={values!r}: all parameter groups share one rate. Give one number.")
    return values[0]


_METRIC_RULES: dict[SchedulerType, Any] = {SchedulerType.REDUCE_ON_PLATEAU: tx.Plateau, SchedulerType.GREEDY: tx.Greedy}


def _constant_until_metric(run: _RateInputs, **options: Any) -> Schedule:
    return tx.constant_schedule(run.peak)


_CYCLES, _MIN_LR = ("num_cycles",), ("min_lr", "min_lr_rate")
_SCHEDULES: dict[SchedulerType, tuple[Callable[..., Schedule], tuple[str, ...]]] = {
    SchedulerType.LINEAR: (_linear, ()),
    SchedulerType.COSINE: (_cosine, _CYCLES),
    SchedulerType.COSINE_WITH_RESTARTS: (_cosine_with_restarts, _CYCLES),
    SchedulerType.POLYNOMIAL: (_polynomial, ("lr_end", "power")),
    SchedulerType.CONSTANT: (_constant, ()),
    SchedulerType.CONSTANT_WITH_WARMUP: (_constant_with_warmup, ()),
    SchedulerType.INVERSE_SQRT: (_inverse_sqrt, ("timescale",)),
    SchedulerType.COSINE_WITH_MIN_LR: (_cosine_with_min_lr, (*_CYCLES, *_MIN_LR)),
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: (_cosine_warmup_with_min_lr, (*_CYCLES, *_MIN_LR, "warmup_lr_rate")),
    SchedulerType.WARMUP_STABLE_DECAY: (
        _warmup_stable_decay,
        ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", *_CYCLES),
    ),
    SchedulerType.REDUCE_ON_PLATEAU: (_constant_until_metric, _field_names(tx.Plateau)),
    SchedulerType.GREEDY: (_constant_until_metric, _field_names(tx.Greedy)),
}
