"""Searches in several processes, for test_processes: `torchrun together.py FOLDER [which process fails]`."""

import json
import sys
from pathlib import Path

import optuna

from fts import Trainer, TrainingArguments
from fts.distributed import destroy_process_group
from fts.errors import FtsError
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Linear, rows

TOO_HIGH = 1e38
ROWS = 8


class Noting(TrainerCallback):
    """Which trials this process trained, and how far."""

    def __init__(self):
        self.seen = []

    def __deepcopy__(self, memo):
        return self

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append([state.trial_name, state.trial_params, state.global_step, Path(args.output_dir).name])


class FailsIn(TrainerCallback):
    """Raises in one process, in the second trial."""

    def __init__(self, rank):
        self.rank = rank

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == self.rank and state.trial_name == "trial 1" and state.global_step == 2:
            raise ValueError("only here")


class Second(optuna.pruners.BasePruner):
    """Prunes the second trial at its second evaluation."""

    def prune(self, study, trial):
        return trial.number == 1 and len(trial.intermediate_values) == 2


def make(folder, *callbacks, world):
    args = TrainingArguments(
        str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=ROWS // world,
        eval_strategy="epoch",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_timeout=60,
    )
    return Trainer(model_init=Linear, args=args, train_dataset=rows(24), eval_dataset=rows(10, seed=1), callbacks=list(callbacks))


def space(trial):
    rate = trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
    return {"learning_rate": TOO_HIGH if trial.number == 2 else rate}


def named(trial):
    return f"trial {trial.number}"


def searched(folder, world, *callbacks):
    """The best run, what this process trained, and, where the study is, its trials."""
    noting, study = Noting(), []
    best = make(folder, noting, *callbacks, world=world).hyperparameter_search(
        space,
        n_trials=4,
        backend="optuna",
        hp_name=named,
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=Second(),
        callbacks=[lambda found, trial: study.append([trial.state.name, trial.values, trial.intermediate_values])],
    )
    return {"best": best._asdict(), "seen": noting.seen, "study": study}


def refused(folder, world, **options):
    try:
        make(folder, world=world).hyperparameter_search(**({"hp_space": space, "n_trials": 2, "backend": "optuna"} | options))
    except (FtsError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder, failing=None):
    trainer = make(folder, world=2)
    world, rank = trainer.world.size, trainer.world.rank
    if failing is not None:
        searched(folder, world, FailsIn(int(failing)))
    found = searched(folder, world)
    divide = lambda given: 1 / 0  # noqa: E731
    found["space"] = refused(folder, world, hp_space=divide)
    found["objective"] = refused(folder, world, compute_objective=divide)
    found["catch"] = refused(folder, world, catch=ValueError)
    found["option"] = refused(folder, world, n_trails=2)
    found["ray"] = refused(folder, world, backend="ray")
    found["again"] = searched(folder, world)["best"]
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
