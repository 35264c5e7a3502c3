"""Searches by optuna: one trial after the other, in this process, or in all processes together."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from fts.errors import ArgumentError, NonFiniteError
from fts.trainer.evaluation.outputs import BestRun
from fts.trainer.search.backends import split_options
from fts.trainer.search.distributed_search import Lead, follow, lead
from fts.trainer.search.objective import Objective, Reports, is_finite
from fts.trainer.search.space import default_hp_space_optuna
from fts.trainer.search.study_record import Record
from fts.trainer.search.table import HEAD, line
from fts.trainer.search.trials import run_trial

if TYPE_CHECKING:
    from fts.trainer.search.hyperparameter_search import Asked
    from fts.trainer.trainer import Trainer

_OURS = ("self", "func", "n_trials", "direction", "directions")


def search_by_optuna(trainer: Trainer, asked: Asked, options: dict[str, Any]) -> BestRun | list[BestRun]:
    """Run the trials of a study, and tell the best.

    Args:
        trainer: what each trial starts from.
        asked: what to search for.
        options: of `optuna.create_study` and `Study.optimize`.
    """
    group = trainer.world
    return lead(group, lambda leading: _study(trainer, asked, options, leading)) if group.is_first else follow(trainer, asked)


def _study(trainer: Trainer, asked: Asked, options: dict[str, Any], leading: Lead) -> BestRun | list[BestRun]:
    of_study, of_optimize = split_options(
        options,
        ("optuna.create_study", _names(optuna.create_study)),
        ("Study.optimize", _names(optuna.Study.optimize)),
    )
    if of_optimize.get("n_jobs", 1) != 1:
        raise ArgumentError(
            f"n_jobs={of_optimize['n_jobs']} runs trials in threads of one process, which share torch's random numbers: a trial "
            "would depend on its neighbours. Start the script several times with the same storage and study_name and "
            "load_if_exists=True, or use backend='ray'."
        )
    if of_optimize.get("catch", ()) and leading.group.size > 1:
        raise ArgumentError(
            f"catch={of_optimize['catch']!r} in {leading.group.size} processes: what one of them raises leaves the others in the "
            "middle of a trial, so that the search cannot go on. Leave it out: losses that are not finite are caught in any case."
        )
    with _quiet(asked.shown):
        study = optuna.create_study(directions=list(asked.directions), **of_study)
        record = Record.begin(study, asked.n_trials)
        shown = [_Table()] if asked.shown else []
        callbacks = [*shown, *(of_optimize.pop("callbacks", None) or ())]
        left = record.left(asked.n_trials)
        of_optimize["catch"] = (
            NonFiniteError,
            *_classes(of_optimize.get("catch", ())),
        )  # too high a rate is a bad trial, no more
        if left:
            study.optimize(_Objective(trainer, asked, record, leading), n_trials=left, callbacks=callbacks, **of_optimize)
        record.end()
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        ended = Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))
        found = ", ".join(f"{count} {state}" for state, count in ended.items()) or "none was begun"
        raise ArgumentError(
            f"No trial of the study is complete ({found}), so there is no best run. Let more trials run to the end."
        )
    best = [study.best_trial] if len(asked.directions) == 1 else study.best_trials
    runs = [BestRun(str(trial.number), _objective(trial), trial.params) for trial in best]
    return runs[0] if len(asked.directions) == 1 else runs


class _Objective:
    """What optuna calls with each trial."""

    def __init__(self, trainer: Trainer, asked: Asked, record: Record, leading: Lead) -> None:
        self.trainer, self.asked, self.record, self.leading = trainer, asked, record, leading

    def __call__(self, trial: optuna.Trial) -> Objective:
        asked = self.asked
        self.record.mark(trial)
        try:
            values = (asked.hp_space or default_hp_space_optuna)(trial)
            if not isinstance(values, Mapping):
                raise ArgumentError(f"hp_space returned {values!r}; it must return a dictionary of arguments by name.")
            group, name = self.leading.group, asked.hp_name
            reports = Reports(asked.compute_objective, len(asked.directions), _teller(trial, asked), group)
            given = trial if group.size == 1 else _frozen(trial)  # the same in all processes
            with self.leading.trial(values, given):
                outcome = run_trial(self.trainer, values, given, run_id=str(trial.number), hp_name=name, reports=reports)
        except NonFiniteError:
            self.record.mark_ended(trial)
            raise
        except (Exception, KeyboardInterrupt):
            raise  # which optuna records itself
        except BaseException:
            trial.study.tell(trial, state=TrialState.FAIL)
            raise
        if outcome.stopped:
            raise optuna.TrialPruned
        if not is_finite(outcome.objective):
            self.record.mark_ended(trial)  # optuna records it as failed
        return outcome.objective


def _frozen(trial: optuna.Trial) -> FrozenTrial:
    """A trial that other processes can have: `suggest_…` gives what was suggested."""
    return next(found for found in trial.study.get_trials(deepcopy=False) if found.number == trial.number)


def _classes(catch: Any) -> tuple[type[Exception], ...]:
    return (catch,) if isinstance(catch, type) else tuple(catch)


def _teller(trial: optuna.Trial, asked: Asked) -> Any:
    def tell(objective: float, metrics: Any, step: int) -> bool:
        trial.report(objective, step)
        return bool(trial.should_prune())

    return tell if len(asked.directions) == 1 else lambda objective, metrics, step: False


class _Table:
    """Prints a line for each trial that is over."""

    def __init__(self) -> None:
        self.begun = False

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        text = line(trial.number, trial.state.name.lower(), _objective(trial), trial.params)
        print(text if self.begun else f"{HEAD}\n{text}")  # noqa: T201
        self.begun = True


def _objective(trial: FrozenTrial) -> Any:
    if trial.values is not None:
        return trial.values if len(trial.values) > 1 else trial.values[0]
    reported = trial.intermediate_values
    return reported[max(reported)] if reported else None


def _names(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in _OURS]


@contextmanager
def _quiet(shown: bool) -> Iterator[None]:
    """Leave optuna's own line about each trial out where the table has it."""
    before = optuna.logging.get_verbosity()
    if shown and before == optuna.logging.INFO:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
