"""Hyper-parameter search: trials of a Trainer, chosen by optuna or Ray Tune.

Uses every other subpackage of the trainer; of a trainer it reads what `SearchableTrainer` declares.
"""

from fts.trainer.search.config import SearchConfig
from fts.trainer.search.objective import default_compute_objective
from fts.trainer.search.search import hyperparameter_search
from fts.trainer.search.searchable_trainer import SearchableTrainer
from fts.trainer.search.space import default_hp_space_optuna, default_hp_space_ray
from fts.trainer.search.trials import record_trial

__all__ = [
    "SearchConfig",
    "SearchableTrainer",
    "default_compute_objective",
    "default_hp_space_optuna",
    "default_hp_space_ray",
    "hyperparameter_search",
    "record_trial",
]
