"""A trial is a function of its arguments: it begins with everything as it was when the search began."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks.state import TrainerControl, TrainerState
from fts.trainer.hub import Uploads
from fts.trainer.model.loss import smoothing_of
from fts.trainer.model.preparation import takes_trial
from fts.trainer.reporting.memory import MemoryMeter
from fts.trainer.run.batch_size import empty_cache
from fts.trainer.search.objective import Objective, Reports
from fts.trainer.search.space import arguments_with

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

T = TypeVar("T", bound="Trainer")


@attrs.frozen
class Outcome:
    """What came of a trial.

    Attributes:
        objective: of its last evaluation.
        stopped: whether the search ended it early.
    """

    objective: Objective
    stopped: bool


def run_trial(
    trainer: Trainer,
    values: Mapping[str, Any],
    trial: Any,
    *,
    run_id: str,
    hp_name: Callable[[Any], str] | None,
    reports: Reports,
) -> Outcome:
    """Train a model from its beginning with the arguments of a trial, below `output_dir`; the trainer stays as it is.

    Args:
        trainer: what the trial starts from.
        values: the arguments that the search chose, by name.
        trial: what `model_init` and `hp_name` get.
        run_id: of the folder `run-{run_id}`.
        hp_name: names the trial, and then its folder.
        reports: takes the figures of every evaluation; without one in training, those of one after it.
    """
    assert trainer.model_init is not None
    args = arguments_with(trainer.args, values, for_model=takes_trial(trainer.model_init))
    args.output_dir = str(Path(str(args.output_dir)) / _folder(hp_name, trial, run_id))
    mine: Trainer | None = fresh(trainer, args)
    assert mine is not None
    mine.hp_name = hp_name
    stopped = False

    def report(metrics: Mapping[str, float], step: int) -> bool:
        nonlocal stopped
        stopped = reports(metrics, step) or stopped
        return stopped

    mine._on_evaluated = report
    try:
        mine.train(trial=trial)
        ended_early = stopped
        if reports.objective is None:
            reports(mine.evaluate(), mine.state.global_step)
    finally:
        mine = None
        gc.collect()  # a trainer and its run refer to each other
        empty_cache(args.device)
    assert reports.objective is not None
    return Outcome(reports.objective, ended_early)


@contextmanager
def parked(trainer: Trainer) -> Iterator[None]:
    """Keep the trainer's own model out of the accelerator's memory, which the trials need.

    Args:
        trainer: its model is on the CPU until the block ends, if the trainer had placed it.
    """
    args = trainer.args
    if args.device.type == "cpu" or args.place_model_on_device is False:
        yield
        return
    trainer.model.to("cpu")
    empty_cache(args.device)
    try:
        yield
    finally:
        trainer.model.to(args.device)


def fresh(trainer: T, args: TrainingArguments) -> T:
    """A trainer as this one was when it was made, with other arguments.

    Data, processing class and the model that `train` replaces are shared. Everything else, such as callbacks and the attributes
    of a subclass, is copied as it is now; what refers to the trainer then refers to the copy.

    Args:
        trainer: stays as it is.
        args: those of the new one.

    Raises:
        ArgumentError: something cannot be copied.
    """
    new = object.__new__(type(trainer))
    own: dict[str, Any] = {
        "args": args,
        "state": TrainerState(),
        "control": TrainerControl(),
        "memory": MemoryMeter(not args.skip_memory_metrics),
        "_uploads": Uploads(),
    }
    handler = trainer.callback_handler
    memo: dict[int, Any] = {id(part): part for part in _shared(trainer)}
    memo |= {id(getattr(trainer, name)): value for name, value in own.items()}
    memo |= {id(part): None for part in _of_a_run(trainer)}
    memo[id(trainer)] = new
    for callback in handler.callbacks:
        _copied(callback, memo, f"the callback {type(callback).__name__}")
    for name, value in vars(trainer).items():
        vars(new)[name] = _copied(value, memo, f"{type(trainer).__name__}.{name}")
    new.label_smoothing = smoothing_of(args.label_smoothing_factor, new.model)
    new.neftune_noise_alpha = args.neftune_noise_alpha
    new.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    new._train_batch_size = args.train_batch_size
    return new


def _shared(trainer: Trainer) -> Iterator[Any]:
    yield from (trainer.train_dataset, trainer.eval_dataset, trainer.processing_class, trainer.model, trainer.model_wrapped)
    yield from (trainer.group, trainer.world)
    if isinstance(trainer.eval_dataset, dict):
        yield from trainer.eval_dataset.values()


def _of_a_run(trainer: Trainer) -> Iterator[Any]:
    handler = trainer.callback_handler
    yield from (trainer.optimizer, trainer.lr_scheduler, trainer._accelerator, getattr(trainer, "memory_figures", None))
    yield from (handler.train_dataloader, handler.eval_dataloader, handler.optimizer, handler.lr_scheduler)


def _copied(value: Any, memo: dict[int, Any], what: str) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise ArgumentError(
            f"A search gives each trial its own copy of {what}, which cannot be copied: {type(error).__name__}: {error}. Make "
            "what cannot be copied (a lock, an open file, a writer) in on_train_begin, or define __deepcopy__, which may return "
            "the object itself to share it."
        ) from error


def _folder(hp_name: Callable[[Any], str] | None, trial: Any, run_id: str) -> str:
    if hp_name is None:
        return f"run-{run_id}"
    name = hp_name(trial)
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".."):
        raise ArgumentError(
            f"hp_name returned {name!r}; it must return a text that can be the name of a folder, without slashes."
        )
    return name


def note_trial(told: TrainerState, trainer: Trainer, trial: Any) -> None:
    """Write into a run's state which trial it is.

    Args:
        told: the state.
        trainer: `hp_name` names the trial.
        trial: an object with `params`, or a dictionary; None where the run is none of a search.
    """
    told.is_hyper_param_search = trial is not None
    told.trial_name = None if trial is None or trainer.hp_name is None else trainer.hp_name(trial)
    told.trial_params = None if trial is None else dict(getattr(trial, "params", trial))
