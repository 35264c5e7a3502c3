"""Arguments that contradict each other."""

from __future__ import annotations

from typing import Protocol

from fts.errors import ArgumentError
from fts.trainer.arguments.enums import IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType


class ConflictArguments(Protocol):
    """The arguments that may contradict each other."""

    bf16: bool
    fp16: bool
    bf16_full_eval: bool
    fp16_full_eval: bool
    optim: OptimizerNames | str
    optim_target_modules: str | list[str] | None
    lr_scheduler_type: SchedulerType | str
    eval_strategy: IntervalStrategy | str
    eval_steps: float | None
    save_strategy: SaveStrategy | str
    save_steps: float
    load_best_model_at_end: bool
    metric_for_best_model: str | None
    dataloader_num_workers: int
    group_by_length: bool
    train_sampling_strategy: str
    auto_find_batch_size: bool

    @property
    def world_size(self) -> int:
        """How many processes train together."""


def check_conflicts(args: ConflictArguments) -> None:
    """Raise ArgumentError for the first contradiction between arguments; change nothing.

    It is called at construction, and again when a run begins, so that two arguments can be changed one after the other.

    >>> from fts.trainer.arguments import TrainingArguments
    >>> args = TrainingArguments()
    >>> args.fp16, args.bf16 = True, True
    >>> check_conflicts(args)
    Traceback (most recent call last):
        ...
    fts.errors.ArgumentError: fp16=True and bf16=True: at most one of them can be True. ...
    """
    for find in _CONFLICTS:
        message = find(args)
        if message is not None:
            raise ArgumentError(message)


def _precisions(args: ConflictArguments) -> str | None:
    if args.fp16 and args.bf16:
        return "fp16=True and bf16=True: at most one of them can be True. bf16 needs no loss scaling; prefer it where it works."
    if args.fp16_full_eval and args.bf16_full_eval:
        return "fp16_full_eval=True and bf16_full_eval=True: at most one of them can be True."
    return None


def _zero_intervals(args: ConflictArguments) -> str | None:
    for event in ("logging", "eval", "save"):
        steps = getattr(args, f"{event}_steps")
        if getattr(args, f"{event}_strategy") == "steps" and steps == 0:
            return (
                f"{event}_steps={steps} with {event}_strategy='steps': it must be above 0. Use {event}_strategy='no' for never."
            )
    return None


def _missing_evaluations(args: ConflictArguments) -> str | None:
    if args.save_strategy == SaveStrategy.BEST and args.metric_for_best_model is None:
        return "`args.metric_for_best_model` must be provided with save_strategy='best': it decides what is best."
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        return "save_strategy='best' needs evaluations, but eval_strategy='no'. Use 'epoch' or 'steps'."
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY) and args.eval_strategy == "no":
        return f"lr_scheduler_type='{args.lr_scheduler_type}' needs evaluations, but eval_strategy='no'. Use 'epoch' or 'steps'."
    return None


def _best_model_not_saved(args: ConflictArguments) -> str | None:
    if not args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
        return None
    if args.eval_strategy == IntervalStrategy.NO or str(args.eval_strategy) != str(args.save_strategy):
        return (
            f"load_best_model_at_end=True needs a checkpoint for each evaluation, but eval_strategy='{args.eval_strategy}' and "
            f"save_strategy='{args.save_strategy}'. Give both the same value ('steps' or 'epoch'), or use save_strategy='best'."
        )
    if args.eval_strategy != IntervalStrategy.STEPS or not args.eval_steps:
        return None
    ratio = args.save_steps / args.eval_steps
    if (args.save_steps < 1) != (args.eval_steps < 1) or abs(ratio - round(ratio)) > 1e-9 or ratio < 1:
        return (
            "load_best_model_at_end=True needs save_steps to be a multiple of eval_steps, so that each checkpoint is evaluated; "
            f"save_steps={args.save_steps} and eval_steps={args.eval_steps} are not."
        )
    return None


def _worker_settings(args: ConflictArguments) -> str | None:
    if args.dataloader_num_workers:
        return None
    for name in ("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_persistent_workers"):
        value = getattr(args, name)
        if value:
            return f"{name}={value!r} needs worker processes, but dataloader_num_workers=0. Use at least 1, or leave {name} out."
    return None


def _sampling_strategies(args: ConflictArguments) -> str | None:
    if args.group_by_length and args.train_sampling_strategy not in ("random", "group_by_length"):
        strategy = args.train_sampling_strategy
        return f"group_by_length=True and train_sampling_strategy={strategy!r} ask for two orders of the data. Give one of them."
    return None


def _batch_size_search(args: ConflictArguments) -> str | None:
    if args.auto_find_batch_size and args.world_size > 1:
        return (
            f"auto_find_batch_size=True in {args.world_size} processes: one that runs out of memory leaves the others inside a "
            "collective, which they cannot abort for another attempt. Find the size in one process, and give it as "
            "per_device_train_batch_size."
        )
    return None


def _target_modules(args: ConflictArguments) -> str | None:
    name = OptimizerNames(args.optim).value
    if args.optim_target_modules and not name.startswith(("galore", "apollo")):
        return (
            f"optim_target_modules={args.optim_target_modules!r} is for the galore and apollo optimizers, but optim={name!r}. "
            "Leave it out, or freeze the other parameters with requires_grad_(False)."
        )
    return None


_CONFLICTS = (
    _precisions,
    _zero_intervals,
    _missing_evaluations,
    _best_model_not_saved,
    _worker_settings,
    _sampling_strategies,
    _batch_size_search,
    _target_modules,
)


def sampling_strategy(args: ConflictArguments) -> str:
    """How the training examples are ordered: "random", "sequential" or "group_by_length".

    >>> from fts.trainer.arguments import TrainingArguments
    >>> sampling_strategy(TrainingArguments(group_by_length=True))
    'group_by_length'
    """
    return "group_by_length" if args.group_by_length else args.train_sampling_strategy
