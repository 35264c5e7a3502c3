"""Search for hyper-parameters: trials of a Trainer, chosen by optuna or Ray Tune."""

from fts.trainer.search.hyperparameter_search import search
from fts.trainer.search.objective import default_compute_objective
from fts.trainer.search.space import default_hp_space_optuna, default_hp_space_ray
from fts.trainer.search.trials import note_trial

__all__ = ["default_compute_objective", "default_hp_space_optuna", "default_hp_space_ray", "note_trial", "search"]
