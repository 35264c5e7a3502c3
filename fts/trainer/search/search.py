"""What `Trainer.hyperparameter_search` does."""

from __future__ import annotations

from typing import Any

from fts.errors import ArgumentError
from fts.trainer.arguments import HPSearchBackend
from fts.trainer.evaluation import BestRun
from fts.trainer.run import overridden
from fts.trainer.search.backends import resolve_backend
from fts.trainer.search.config import SearchConfig
from fts.trainer.search.searchable_trainer import SearchableTrainer
from fts.trainer.search.trials import offload_model


def hyperparameter_search(
    trainer: SearchableTrainer, config: SearchConfig, backend: str | HPSearchBackend | None, options: dict[str, Any]
) -> BestRun | list[BestRun]:
    """Run the trials and return the best run; see `Trainer.hyperparameter_search`.

    Args:
        trainer: each trial trains a copy of it.
        config: what to search for.
        backend: "optuna" or "ray"; None for the first that is installed.
        options: keyword arguments of the backend.
    """
    chosen = resolve_backend(backend)
    _check_trainer(trainer)
    config.check()
    with offload_model(trainer.model, trainer.args):
        if chosen is HPSearchBackend.RAY:
            if trainer.world.size > 1:
                raise ArgumentError(
                    f"backend='ray': Ray starts a process for each trial itself, but {trainer.world.size} processes were "
                    "started. Start the script without a launcher, or use backend='optuna', whose trials train on all ranks."
                )
            from fts.trainer.search.ray_backend import search_with_ray

            return search_with_ray(trainer, config, options)
        from fts.trainer.search.optuna_backend import search_with_optuna

        return search_with_optuna(trainer, config, options)


def _check_trainer(trainer: SearchableTrainer) -> None:
    if trainer.model_init is None:
        raise ArgumentError("hyperparameter_search trains a new model in each trial: Trainer(model_init=...) instead of model=.")
    if trainer.eval_dataset is None and not overridden(trainer, "evaluate", "get_eval_dataloader"):
        raise ArgumentError("hyperparameter_search needs data to compare the trials by: Trainer(..., eval_dataset=...).")
