"""What `Trainer.hyperparameter_search` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from fts.errors import ArgumentError
from fts.trainer.arguments.choices import HPSearchBackend
from fts.trainer.callbacks import PrinterCallback, ProgressCallback
from fts.trainer.evaluation.outputs import BestRun
from fts.trainer.run.overrides import overridden
from fts.trainer.search.backends import backend_of
from fts.trainer.search.objective import default_compute_objective
from fts.trainer.search.trials import parked

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

DIRECTIONS = ("minimize", "maximize")


@attrs.frozen
class Asked:
    """What a search is asked for.

    Attributes:
        hp_space: where it looks; None for the backend's default.
        compute_objective: figures of an evaluation -> what is made better.
        n_trials: how many trials.
        directions: "minimize" or "maximize" for each number of the objective.
        hp_name: names a trial.
        shown: whether lines about trials are printed.
    """

    hp_space: Callable[[Any], dict[str, Any]] | None
    compute_objective: Callable[[dict[str, float]], Any]
    n_trials: int
    directions: tuple[str, ...]
    hp_name: Callable[[Any], str] | None
    shown: bool


def search(
    trainer: Trainer,
    hp_space: Callable[[Any], dict[str, Any]] | None,
    compute_objective: Callable[[dict[str, float]], Any] | None,
    n_trials: int,
    direction: str | Sequence[str],
    backend: str | HPSearchBackend | None,
    hp_name: Callable[[Any], str] | None,
    options: dict[str, Any],
) -> BestRun | list[BestRun]:
    """Run the trials, and tell the best; see `Trainer.hyperparameter_search`."""
    chosen = backend_of(backend)
    _check(trainer, n_trials)
    shown = any(isinstance(callback, (PrinterCallback, ProgressCallback)) for callback in trainer.callback_handler.callbacks)
    asked = Asked(hp_space, compute_objective or default_compute_objective, n_trials, _directions(direction), hp_name, shown)
    with parked(trainer):
        if chosen is HPSearchBackend.RAY:
            if trainer.world.size > 1:
                raise ArgumentError(
                    f"backend='ray': Ray starts a process for each trial itself, but {trainer.world.size} processes were "
                    "started. Start the script without a launcher, or use backend='optuna', whose trials all train together."
                )
            from fts.trainer.search.ray_backend import search_by_ray

            return search_by_ray(trainer, asked, options)
        from fts.trainer.search.optuna_backend import search_by_optuna

        return search_by_optuna(trainer, asked, options)


def _check(trainer: Trainer, n_trials: Any) -> None:
    if trainer.model_init is None:
        raise ArgumentError("hyperparameter_search trains a new model in each trial: Trainer(model_init=...) instead of model=.")
    if trainer.eval_dataset is None and not overridden(trainer, "evaluate", "get_eval_dataloader"):
        raise ArgumentError("hyperparameter_search needs data to compare the trials by: Trainer(..., eval_dataset=...).")
    if isinstance(n_trials, bool) or not isinstance(n_trials, int) or n_trials < 1:
        raise ArgumentError(f"n_trials={n_trials!r}: it must be a whole number above 0.")


def _directions(direction: str | Sequence[str]) -> tuple[str, ...]:
    several = (direction,) if isinstance(direction, str) else tuple(direction)
    if not several or any(one not in DIRECTIONS for one in several):
        raise ArgumentError(f"direction={direction!r}: it must be 'minimize' or 'maximize', or a list of these.")
    return several
