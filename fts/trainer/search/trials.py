"""The trials of a search: each depends on its arguments alone, and starts from the trainer as it was when the search began."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
from torch import nn

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import TrainerControl, TrainerState
from fts.trainer.hub import UploadQueue
from fts.trainer.model import accepts_trial, resolve_label_smoothing
from fts.trainer.reporting import TrainerMemoryTracker
from fts.trainer.run import empty_cache
from fts.trainer.search.objective import Objective, TrialReporter
from fts.trainer.search.searchable_trainer import SearchableTrainer
from fts.trainer.search.trial_arguments import with_trial_values

T = TypeVar("T", bound=SearchableTrainer)


@attrs.frozen
class TrialResult:
    """The result of a trial.

    Attributes:
        objective: of its last evaluation.
        pruned: whether the search ended it early.
    """

    objective: Objective
    pruned: bool


def run_trial(
    trainer: SearchableTrainer,
    values: Mapping[str, Any],
    trial: Any,
    *,
    run_id: str,
    hp_name: Callable[[Any], str] | None,
    reporter: TrialReporter,
) -> TrialResult:
    """Train a new model with the arguments of a trial, in a folder below `output_dir`; the trainer stays unchanged.

    Args:
        trainer: the trial trains a copy of it.
        values: the arguments that the search chose, by name.
        trial: what `model_init` and `hp_name` get.
        run_id: of the folder `run-{run_id}`.
        hp_name: names the trial and its folder.
        reporter: gets the metrics of every evaluation; without one during training, those of one after it.
    """
    assert trainer.model_init is not None
    args = with_trial_values(trainer.args, values, for_model=accepts_trial(trainer.model_init))
    args.output_dir = str(Path(str(args.output_dir)) / _folder_name(hp_name, trial, run_id))
    trial_trainer: SearchableTrainer | None = copy_for_trial(trainer, args)
    assert trial_trainer is not None
    trial_trainer.hp_name = hp_name
    pruned = False

    def report(metrics: Mapping[str, float], step: int) -> bool:
        nonlocal pruned
        pruned = reporter(metrics, step) or pruned
        return pruned

    trial_trainer.report_to_hp_search = report
    try:
        trial_trainer.train(trial=trial)
        pruned_in_training = pruned
        if reporter.objective is None:
            reporter(trial_trainer.evaluate(), trial_trainer.state.global_step)
    finally:
        trial_trainer = None
        gc.collect()  # a trainer and its run refer to each other
        empty_cache(args.device)
    assert reporter.objective is not None
    return TrialResult(reporter.objective, pruned_in_training)


@contextmanager
def offload_model(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """A block in which a trainer's own model is on the CPU, since the trials need the accelerator's memory.

    Args:
        model: is moved if the trainer had placed it.
        args: say where it belongs.
    """
    if args.device.type == "cpu" or args.place_model_on_device is False:
        yield
        return
    model.to("cpu")
    empty_cache(args.device)
    try:
        yield
    finally:
        model.to(args.device)


def copy_for_trial(trainer: T, args: TrainingArguments) -> T:
    """A trainer like this one when it was made, with other arguments.

    Data, processing class and the model that `train` replaces are shared. Everything else, such as callbacks and the attributes
    of a subclass, is copied as it is now; references to the trainer become references to the copy.

    Args:
        trainer: stays unchanged.
        args: of the copy.

    Raises:
        ArgumentError: something cannot be copied.
    """
    new = object.__new__(type(trainer))
    replaced = {
        id(trainer.args): args,
        id(trainer.state): TrainerState(),
        id(trainer.control): TrainerControl(),
        id(trainer.memory): TrainerMemoryTracker(not args.skip_memory_metrics),
        id(trainer.hub_session.uploads): UploadQueue(),
        id(trainer): new,
    }
    memo: dict[int, Any] = {id(part): part for part in _shared_parts(trainer)}
    memo |= replaced
    memo |= {id(part): None for part in _parts_of_run(trainer)}
    for callback in trainer.callback_handler.callbacks:
        _copy(callback, memo, f"the callback {type(callback).__name__}")
    for name, value in vars(trainer).items():
        vars(new)[name] = _copy(value, memo, f"{type(trainer).__name__}.{name}")
    new.label_smoothing = resolve_label_smoothing(args.label_smoothing_factor, new.model)
    new.neftune_noise_alpha = args.neftune_noise_alpha
    new.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    new._train_batch_size = args.train_batch_size
    return new


def _shared_parts(trainer: SearchableTrainer) -> Iterator[Any]:
    yield from (trainer.train_dataset, trainer.eval_dataset, trainer.processing_class, trainer.model, trainer.model_wrapped)
    yield from (trainer.group, trainer.world)
    if isinstance(trainer.eval_dataset, dict):
        yield from trainer.eval_dataset.values()


def _parts_of_run(trainer: SearchableTrainer) -> Iterator[Any]:
    handler = trainer.callback_handler
    yield from (trainer.optimizer, trainer.lr_scheduler, trainer._accelerator, getattr(trainer, "memory_metrics", None))
    yield from (handler.train_dataloader, handler.eval_dataloader, handler.optimizer, handler.lr_scheduler)


def _copy(value: Any, memo: dict[int, Any], name: str) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise ArgumentError(
            f"A search gives each trial its own copy of {name}, which cannot be copied: {type(error).__name__}: {error}. Create "
            "what cannot be copied (a lock, an open file, a writer) in on_train_begin, or define __deepcopy__, which may return "
            "the object itself to share it."
        ) from error


def _folder_name(hp_name: Callable[[Any], str] | None, trial: Any, run_id: str) -> str:
    if hp_name is None:
        return f"run-{run_id}"
    name = hp_name(trial)
    if not isinstance(name, str) or name != Path(name).name or name in ("", ".."):
        raise ArgumentError(f"hp_name returned {name!r}; it must return a string that can be a folder's name, without slashes.")
    return name


def record_trial(trainer_state: TrainerState, trial: Any, hp_name: Callable[[Any], str] | None) -> None:
    """Record in a run's state which trial it is.

    Args:
        trainer_state: of the run.
        trial: an object with `params`, or a dictionary; None if the run is not a trial.
        hp_name: names the trial.
    """
    trainer_state.is_hyper_param_search = trial is not None
    trainer_state.trial_name = None if trial is None or hp_name is None else hp_name(trial)
    trainer_state.trial_params = None if trial is None else dict(getattr(trial, "params", trial))
