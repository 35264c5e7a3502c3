"""Searches with Ray Tune: each trial in a worker process, as many at once as the resources allow."""

from __future__ import annotations

import inspect
import logging
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ray import cloudpickle, tune

from fts.errors import ArgumentError, NonFiniteError
from fts.trainer.arguments import apply_tf32, enable_full_determinism, with_settings
from fts.trainer.evaluation import BestRun
from fts.trainer.model import prepare_model
from fts.trainer.reporting import TrainerMemoryTracker, apply_log_level
from fts.trainer.search.backends import split_options
from fts.trainer.search.config import SearchConfig
from fts.trainer.search.objective import TrialReporter
from fts.trainer.search.searchable_trainer import SearchableTrainer
from fts.trainer.search.space import default_hp_space_ray
from fts.trainer.search.trials import copy_for_trial, run_trial

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=SearchableTrainer)

OBJECTIVE = "objective"
"""The name of the objective in Ray's reports: `ASHAScheduler(metric="objective", mode="min")`."""

_RESERVED = ("run_or_experiment", "metric", "mode", "config", "num_samples")


def search_with_ray(trainer: SearchableTrainer, config: SearchConfig, options: dict[str, Any]) -> BestRun:
    """Run the trials in Ray's workers, and return the best run.

    Args:
        trainer: each trial trains a copy of it, which is sent to the workers without its model.
        config: what to search for.
        options: of `ray.tune.run`, and `ray_scope`: which of a trial's reports count ("last", "all", "avg" …).
    """
    run_options, best_options = split_options(options, ("ray.tune.run", _parameters(tune.run)), ("get_best_trial", ["ray_scope"]))
    if len(config.directions) > 1:
        raise ArgumentError(f"direction={list(config.directions)}: Ray Tune has one objective. Use backend='optuna' for several.")
    _check_scheduler(run_options.get("scheduler"))
    space = (config.hp_space or default_hp_space_ray)(None)
    if not isinstance(space, Mapping):
        raise ArgumentError(f"hp_space returned {space!r}; it must return a dictionary of Tune's distributions by name.")
    gpu = {"gpu": 1} if trainer.args.device.type == "cuda" else {}
    defaults: dict[str, Any] = {"resources_per_trial": {"cpu": 1} | gpu}
    trainable = tune.with_parameters(_train_trial, trainer=copy_for_workers(trainer), search_config=config)
    analysis = tune.run(trainable, config=dict(space), num_samples=config.n_trials, **(defaults | run_options))
    best = analysis.get_best_trial(OBJECTIVE, config.directions[0][:3], best_options.get("ray_scope", "last"))
    if best is None:
        raise ArgumentError("No trial reported an objective that is a number, so there is no best run.")
    return BestRun(best.trial_id, best.last_result[OBJECTIVE], best.config, analysis)


def copy_for_workers(trainer: T) -> T:
    """A copy of a trainer that can be sent to other processes: without its model, and with an absolute `output_dir`.

    Args:
        trainer: stays unchanged.

    Raises:
        ArgumentError: a part cannot be sent to another process.
    """
    args = with_settings(trainer.args, output_dir=str(Path(str(trainer.args.output_dir)).absolute()))
    copied = copy_for_trial(trainer, args)
    copied.model = copied.model_wrapped = copied.callback_handler.model = None  # type: ignore[assignment]  # see _train_trial
    copied.memory = TrainerMemoryTracker(False)  # a trial creates its own
    if _pickling_error(copied) is not None:
        parts = {f"{type(trainer).__name__}.{name}": value for name, value in vars(copied).items() if name != "callback_handler"}
        parts |= {f"the callback {type(part).__name__}": part for part in copied.callback_handler.callbacks}
        parts[f"the class {type(trainer).__name__}"] = type(trainer)
        problems = [f"{name} ({error})" for name, part in parts.items() if (error := _pickling_error(part))]
        raise ArgumentError(
            f"Ray trains in other processes, to which these cannot be sent: {'; '.join(problems)}. Create what belongs to a "
            "process (a lock, an open file, a writer) in on_train_begin, or use backend='optuna'."
        )
    return copied


def _pickling_error(part: Any) -> str | None:
    try:
        cloudpickle.dumps(part)
    except Exception as error:  # noqa: BLE001 - any error of a user's object is reported
        return f"{type(error).__name__}: {error}"
    return None


def _train_trial(values: dict[str, Any], trainer: SearchableTrainer, search_config: SearchConfig) -> None:
    """What a worker runs: the settings of the process that the Trainer's constructor makes, and the trial."""
    args = trainer.args
    apply_log_level(args)
    apply_tf32(args.tf32, torch_compile=args.torch_compile, fp16=args.fp16)
    if args.full_determinism:
        enable_full_determinism(args.seed)
    model = prepare_model(trainer.call_model_init(), args)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
    reporter = TrialReporter(search_config.compute_objective, 1, _report)
    run_id = str(tune.get_context().get_trial_id())
    try:
        run_trial(trainer, values, values, run_id=run_id, hp_name=search_config.hp_name, reporter=reporter)
    except NonFiniteError:  # a learning rate that is too high only makes a bad trial
        logger.warning("The trial with %s has no objective.", values, exc_info=True)
        tune.report({OBJECTIVE: math.nan})


def _report(objective: float, metrics: Mapping[str, Any], step: int) -> bool:
    numeric = {name: value for name, value in metrics.items() if isinstance(value, numbers.Number)}
    tune.report(numeric | {"step": step, OBJECTIVE: objective})  # a scheduler may end the trial inside this call
    return False


def _check_scheduler(scheduler: Any) -> None:
    from ray.tune.schedulers import PopulationBasedTraining

    if isinstance(scheduler, PopulationBasedTraining):
        raise ArgumentError(
            f"scheduler={type(scheduler).__name__} moves checkpoints from one trial to another, which hyperparameter_search does "
            "not do. Use ASHAScheduler, HyperBandScheduler or MedianStoppingRule."
        )


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in _RESERVED]
