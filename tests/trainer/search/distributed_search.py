"""Searches on several ranks, for test_distributed_search: `torchrun distributed_search.py FOLDER [rank that fails]`."""

import json
import sys
from pathlib import Path

import optuna

from fts import Trainer, TrainingArguments
from fts.distributed import destroy_process_group
from fts.errors import FtsError
from fts.trainer import TrainerCallback
from tests.trainer.helpers import Linear, make_examples

TOO_HIGH = 1e38
ROWS = 8


class RecordsTrials(TrainerCallback):
    """The trials that this rank trained, and their last steps."""

    def __init__(self):
        self.seen = []

    def __deepcopy__(self, memo):
        return self

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append([state.trial_name, state.trial_params, state.global_step, Path(args.output_dir).name])


class FailsIn(TrainerCallback):
    """Raises on one rank, in the second trial."""

    def __init__(self, rank):
        self.rank = rank

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == self.rank and state.trial_name == "trial 1" and state.global_step == 2:
            raise ValueError("only on one rank")


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
    return Trainer(
        model_init=Linear,
        args=args,
        train_dataset=make_examples(24),
        eval_dataset=make_examples(10, seed=1),
        callbacks=list(callbacks),
    )


def space(trial):
    rate = trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
    return {"learning_rate": TOO_HIGH if trial.number == 2 else rate}


def trial_name(trial):
    return f"trial {trial.number}"


def run_search(folder, world, *callbacks):
    """The best run, the trials that this rank trained, and, on the main process, those of the study."""
    trained, study = RecordsTrials(), []
    best = make(folder, trained, *callbacks, world=world).hyperparameter_search(
        space,
        n_trials=4,
        backend="optuna",
        hp_name=trial_name,
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=Second(),
        callbacks=[lambda found, trial: study.append([trial.state.name, trial.values, trial.intermediate_values])],
    )
    return {"best": best._asdict(), "seen": trained.seen, "study": study}


def search_error(folder, world, **options):
    try:
        make(folder, world=world).hyperparameter_search(**({"hp_space": space, "n_trials": 2, "backend": "optuna"} | options))
    except (FtsError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder, failing=None):
    trainer = make(folder, world=2)
    world, rank = trainer.world.size, trainer.world.rank
    if failing is not None:
        run_search(folder, world, FailsIn(int(failing)))
    found = run_search(folder, world)
    divide = lambda given: 1 / 0  # noqa: E731
    found["space"] = search_error(folder, world, hp_space=divide)
    found["objective"] = search_error(folder, world, compute_objective=divide)
    found["catch"] = search_error(folder, world, catch=ValueError)
    found["option"] = search_error(folder, world, n_trails=2)
    found["ray"] = search_error(folder, world, backend="ray")
    found["again"] = run_search(folder, world)["best"]
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
