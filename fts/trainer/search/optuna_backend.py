"""Searches with optuna: one trial after the other, in this process or on all ranks."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from fts.errors import ArgumentError, NonFiniteError
from fts.trainer.callbacks import PrinterCallback, ProgressCallback
from fts.trainer.evaluation import BestRun
from fts.trainer.search.backends import split_options
from fts.trainer.search.config import SearchConfig
from fts.trainer.search.distributed_search import TrialBroadcaster, run_on_main, train_broadcast_trials
from fts.trainer.search.objective import Objective, TrialReporter, is_finite
from fts.trainer.search.search_record import SearchRecord
from fts.trainer.search.searchable_trainer import SearchableTrainer
from fts.trainer.search.space import default_hp_space_optuna
from fts.trainer.search.trial_table import HEADER, format_trial
from fts.trainer.search.trials import run_trial

_RESERVED = ("self", "func", "n_trials", "direction", "directions")


def search_with_optuna(trainer: SearchableTrainer, config: SearchConfig, options: dict[str, Any]) -> BestRun | list[BestRun]:
    """Run the trials of a study, and return the best run.

    Args:
        trainer: each trial trains a copy of it.
        config: what to search for.
        options: of `optuna.create_study` and `Study.optimize`.
    """
    group = trainer.world
    if not group.is_main_process:
        found: BestRun | list[BestRun] = train_broadcast_trials(trainer, config)
        return found
    return run_on_main(group, lambda broadcaster: _run_study(trainer, config, options, broadcaster))


def _run_study(
    trainer: SearchableTrainer, config: SearchConfig, options: dict[str, Any], broadcaster: TrialBroadcaster
) -> BestRun | list[BestRun]:
    study_options, optimize_options = split_options(
        options,
        ("optuna.create_study", _parameters(optuna.create_study)),
        ("Study.optimize", _parameters(optuna.Study.optimize)),
    )
    _check_options(optimize_options, broadcaster.group.size)
    prints_table = any(isinstance(part, (PrinterCallback, ProgressCallback)) for part in trainer.callback_handler.callbacks)
    with _quiet(prints_table):
        study = optuna.create_study(directions=list(config.directions), **study_options)
        record = SearchRecord.start_or_resume(study, config.n_trials)
        table = [_PrintTable()] if prints_table else []
        callbacks = [*table, *(optimize_options.pop("callbacks", None) or ())]
        # a learning rate that is too high only makes a bad trial
        optimize_options["catch"] = (NonFiniteError, *_exception_types(optimize_options.get("catch", ())))
        remaining = record.remaining(config.n_trials)
        if remaining:
            objective = _TrialObjective(trainer, config, record, broadcaster)
            study.optimize(objective, n_trials=remaining, callbacks=callbacks, **optimize_options)
        record.end()
    return _best_runs(study, several=len(config.directions) > 1)


def _check_options(options: Mapping[str, Any], world_size: int) -> None:
    if options.get("n_jobs", 1) != 1:
        raise ArgumentError(
            f"n_jobs={options['n_jobs']} runs trials in threads of one process, which share torch's random numbers: each trial "
            "would depend on the others. Start the script several times with the same storage and study_name and "
            "load_if_exists=True, or use backend='ray'."
        )
    if options.get("catch", ()) and world_size > 1:
        raise ArgumentError(
            f"catch={options['catch']!r} with {world_size} processes: if one rank raises, the others are still in the middle of "
            "the trial, and the search cannot continue. Leave it out: losses that are not finite are caught in any case."
        )


def _best_runs(study: optuna.Study, *, several: bool) -> BestRun | list[BestRun]:
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        states = Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))
        counts = ", ".join(f"{count} {state}" for state, count in states.items()) or "none was started"
        raise ArgumentError(
            f"No trial of the study is complete ({counts}), so there is no best run. Let more trials run to the end."
        )
    best = study.best_trials if several else [study.best_trial]
    runs = [BestRun(str(trial.number), _objective_of(trial), trial.params) for trial in best]
    return runs if several else runs[0]


class _TrialObjective:
    """The objective function of a study: trains a trial."""

    def __init__(
        self, trainer: SearchableTrainer, config: SearchConfig, record: SearchRecord, broadcaster: TrialBroadcaster
    ) -> None:
        self.trainer, self.config, self.record, self.broadcaster = trainer, config, record, broadcaster

    def __call__(self, trial: optuna.Trial) -> Objective:
        config, group = self.config, self.broadcaster.group
        self.record.add_trial(trial)
        try:
            values = (config.hp_space or default_hp_space_optuna)(trial)
            if not isinstance(values, Mapping):
                raise ArgumentError(f"hp_space returned {values!r}; it must return a dictionary of arguments by name.")
            report = _no_pruning if len(config.directions) > 1 else _report_to(trial)
            reporter = TrialReporter(config.compute_objective, len(config.directions), report, group)
            shared = trial if group.size == 1 else _frozen_trial(trial)  # the same on all ranks
            run_id = str(trial.number)
            with self.broadcaster.trial(values, shared):
                result = run_trial(self.trainer, values, shared, run_id=run_id, hp_name=config.hp_name, reporter=reporter)
        except NonFiniteError:
            self.record.mark_ended(trial)
            raise
        except (Exception, KeyboardInterrupt):
            raise  # optuna records these itself
        except BaseException:
            trial.study.tell(trial, state=TrialState.FAIL)
            raise
        if result.pruned:
            raise optuna.TrialPruned
        if not is_finite(result.objective):
            self.record.mark_ended(trial)  # optuna records it as failed
        return result.objective


def _frozen_trial(trial: optuna.Trial) -> FrozenTrial:
    """A trial that can be sent to other ranks: its `suggest_…` methods return what was suggested before."""
    return next(frozen for frozen in trial.study.get_trials(deepcopy=False) if frozen.number == trial.number)


def _exception_types(catch: Any) -> tuple[type[Exception], ...]:
    return (catch,) if isinstance(catch, type) else tuple(catch)


def _report_to(trial: optuna.Trial) -> Callable[[float, Any, int], bool]:
    def report(objective: float, metrics: Any, step: int) -> bool:
        trial.report(objective, step)
        return bool(trial.should_prune())

    return report


def _no_pruning(objective: Any, metrics: Any, step: int) -> bool:
    return False


class _PrintTable:
    """A callback of optuna that prints a line for each trial that has ended."""

    def __init__(self) -> None:
        self.has_header = False

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        text = format_trial(trial.number, trial.state.name.lower(), _objective_of(trial), trial.params)
        print(text if self.has_header else f"{HEADER}\n{text}")  # noqa: T201
        self.has_header = True


def _objective_of(trial: FrozenTrial) -> Any:
    if trial.values is not None:
        return trial.values if len(trial.values) > 1 else trial.values[0]
    reported = trial.intermediate_values
    return reported[max(reported)] if reported else None


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in _RESERVED]


@contextmanager
def _quiet(prints_table: bool) -> Iterator[None]:
    """Silence optuna's own line about each trial where the table has one."""
    before = optuna.logging.get_verbosity()
    if prints_table and before == optuna.logging.INFO:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
