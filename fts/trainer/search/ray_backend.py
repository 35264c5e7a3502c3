"""Searches by Ray Tune: each trial in a worker process, as many at once as there is room for."""

from __future__ import annotations

import inspect
import logging
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import cloudpickle, tune

from fts.errors import ArgumentError, NonFiniteError
from fts.trainer.arguments.tf32 import apply_tf32
from fts.trainer.evaluation.outputs import BestRun
from fts.trainer.reporting.log_level import apply_log_level
from fts.trainer.reporting.memory import MemoryMeter
from fts.trainer.run.plan import with_settings
from fts.trainer.run.seed import enable_full_determinism
from fts.trainer.search.backends import split_options
from fts.trainer.search.objective import Reports
from fts.trainer.search.space import default_hp_space_ray
from fts.trainer.search.trials import fresh, run_trial

if TYPE_CHECKING:
    from fts.trainer.search.hyperparameter_search import Asked
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

OBJECTIVE = "objective"
"""What the number is called in Ray's reports: `ASHAScheduler(metric="objective", mode="min")`."""

_OURS = ("run_or_experiment", "metric", "mode", "config", "num_samples")


def search_by_ray(trainer: Trainer, asked: Asked, options: dict[str, Any]) -> BestRun:
    """Run the trials in Ray's workers, and tell the best.

    Args:
        trainer: what each trial starts from; it is sent to the workers without its model.
        asked: what to search for.
        options: of `ray.tune.run`, and `ray_scope`: which of a trial's reports count ("last", "all", "avg" …).
    """
    of_run, of_best = split_options(options, ("ray.tune.run", _names(tune.run)), ("get_best_trial", ["ray_scope"]))
    if len(asked.directions) > 1:
        raise ArgumentError(f"direction={list(asked.directions)}: Ray Tune has one objective. Use backend='optuna' for several.")
    _check_scheduler(of_run.get("scheduler"))
    space = (asked.hp_space or default_hp_space_ray)(None)
    if not isinstance(space, Mapping):
        raise ArgumentError(f"hp_space returned {space!r}; it must return a dictionary of Tune's distributions by name.")
    gpu = {"gpu": 1} if trainer.args.device.type == "cuda" else {}
    defaults: dict[str, Any] = {"resources_per_trial": {"cpu": 1} | gpu}
    trainable = tune.with_parameters(_train, trainer=shippable(trainer), asked=asked)
    analysis = tune.run(trainable, config=dict(space), num_samples=asked.n_trials, **(defaults | of_run))
    best = analysis.get_best_trial(OBJECTIVE, asked.directions[0][:3], of_best.get("ray_scope", "last"))
    if best is None:
        raise ArgumentError("No trial gave an objective that is a number: there is no best run.")
    return BestRun(best.trial_id, best.last_result[OBJECTIVE], best.config, analysis)


def shippable(trainer: Trainer) -> Trainer:
    """A copy of a trainer that other processes can have: without its model, and with an absolute `output_dir`.

    Args:
        trainer: stays as it is.

    Raises:
        ArgumentError: a part cannot be sent to another process.
    """
    args = with_settings(trainer.args, output_dir=str(Path(str(trainer.args.output_dir)).absolute()))
    shipped = fresh(trainer, args)
    shipped.model = shipped.model_wrapped = shipped.callback_handler.model = None  # type: ignore[assignment]  # see _train
    shipped.memory = MemoryMeter(False)  # a trial makes its own
    if _why_not(shipped) is not None:
        parts = {f"{type(trainer).__name__}.{name}": value for name, value in vars(shipped).items() if name != "callback_handler"}
        parts |= {f"the callback {type(part).__name__}": part for part in shipped.callback_handler.callbacks}
        parts[f"the class {type(trainer).__name__}"] = type(trainer)
        found = [f"{name} ({why})" for name, part in parts.items() if (why := _why_not(part))]
        raise ArgumentError(
            f"Ray trains in other processes, to which these cannot be sent: {'; '.join(found)}. Make what belongs to a process "
            "(a lock, an open file, a writer) in on_train_begin, or use backend='optuna'."
        )
    return shipped


def _why_not(part: Any) -> str | None:
    try:
        cloudpickle.dumps(part)
    except Exception as error:  # noqa: BLE001 - whatever a user's object raises is the answer
        return f"{type(error).__name__}: {error}"
    return None


def _train(config: dict[str, Any], trainer: Trainer, asked: Asked) -> None:
    """What a worker runs: what the Trainer's constructor does to a process, and the trial."""
    apply_log_level(trainer.args)
    apply_tf32(trainer.args)
    if trainer.args.full_determinism:
        enable_full_determinism(trainer.args.seed)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = trainer._placed(trainer.call_model_init())
    reports = Reports(asked.compute_objective, 1, _tell)
    run_id = tune.get_context().get_trial_id()
    try:
        run_trial(trainer, config, config, run_id=str(run_id), hp_name=asked.hp_name, reports=reports)
    except NonFiniteError:  # too high a rate is a bad trial, no more
        logger.warning("The trial with %s has no objective.", config, exc_info=True)
        tune.report({OBJECTIVE: math.nan})


def _tell(objective: float, metrics: Mapping[str, Any], step: int) -> bool:
    figures = {name: value for name, value in metrics.items() if isinstance(value, numbers.Number)}
    tune.report(figures | {"step": step, OBJECTIVE: objective})  # a scheduler that stops the trial ends it in here
    return False


def _check_scheduler(scheduler: Any) -> None:
    from ray.tune.schedulers import PopulationBasedTraining

    if isinstance(scheduler, PopulationBasedTraining):
        raise ArgumentError(
            f"scheduler={type(scheduler).__name__} moves checkpoints from one trial to another, which hyperparameter_search does "
            "not do. Use ASHAScheduler, HyperBandScheduler or MedianStoppingRule."
        )


def _names(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in _OURS]
