import os
import signal
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest

import fts
from fts.errors import ArgumentError, CallbackError
from fts.trainer import BestRun, PrinterCallback, TrainerCallback
from tests.trainer.search.search_jobs import make, rates, result, start


@pytest.fixture
def study_options():
    """The storage and the name of a study."""
    return {"storage": optuna.storages.InMemoryStorage(), "study_name": "it"}


def study_of(study_options):
    return optuna.load_study(**study_options)


def states(study):
    return [trial.state.name for trial in study.trials]


def test_ten_trials_find_the_better_rate(tmp_path, capsys, study_options):
    trainer = make(tmp_path, num_train_epochs=2)
    how = {"sampler": optuna.samplers.TPESampler(seed=0), "pruner": optuna.pruners.NopPruner()}
    best = trainer.hyperparameter_search(rates, n_trials=10, **how, **study_options)
    study = study_of(study_options)
    assert states(study) == ["COMPLETE"] * 10
    worst = max(study.trials, key=lambda trial: trial.value)
    assert best.objective == min(trial.value for trial in study.trials) < 0.6 * worst.value
    assert best.hyperparameters["learning_rate"] > 10 * worst.params["learning_rate"]
    assert best == BestRun(str(study.best_trial.number), study.best_value, study.best_params, None)
    assert (tmp_path / f"run-{best.run_id}" / "checkpoint-12" / "model.safetensors").is_file()
    lines = [line for line in capsys.readouterr().out.splitlines() if "complete" in line]
    assert [int(line.split()[0]) for line in lines] == list(range(10))
    assert f"{best.objective:.4g}" in lines[int(best.run_id)] and "learning_rate=" in lines[0]


def test_the_objective_is_maximized(tmp_path, study_options):
    trainer = make(tmp_path, num_train_epochs=1)
    best = trainer.hyperparameter_search(rates, n_trials=3, direction="maximize", **study_options)
    assert best.objective == max(trial.value for trial in study_of(study_options).trials)


def test_pruned_trials_are_recorded_as_pruned(tmp_path, capsys, study_options):
    class Second(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.number == 1 and len(trial.intermediate_values) == 2

    ended = []

    class Ends(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ended.append(state.global_step)

    trainer = make(tmp_path, Ends())
    best = trainer.hyperparameter_search(rates, n_trials=3, pruner=Second(), **study_options)
    study = study_of(study_options)
    assert states(study) == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert list(study.trials[1].intermediate_values) == [6, 12] and list(study.trials[0].intermediate_values) == [6, 12, 18]
    assert ended == [18, 12, 18]  # so that trackers finish their runs
    assert best.run_id in ("0", "2")
    assert "pruned" in capsys.readouterr().out


def test_there_is_no_best_run_if_all_trials_are_pruned(tmp_path):
    class All(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return True

    with pytest.raises(ArgumentError, match=r"No trial .* complete \(2 pruned\)"):
        make(tmp_path).hyperparameter_search(rates, n_trials=2, pruner=All())


def test_the_last_evaluation_decides_without_one_in_training(tmp_path):
    trainer = make(tmp_path, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    best = trainer.hyperparameter_search(rates, n_trials=2)
    assert best.objective > 0


def test_several_evaluation_sets_make_one_objective(tmp_path, study_options):
    trainer = make(tmp_path, load_best_model_at_end=False, num_train_epochs=1)
    trainer.eval_dataset = {"one": trainer.eval_dataset[:4], "other": trainer.eval_dataset[4:]}
    seen = []
    compute = lambda metrics: seen.append(metrics) or fts.default_compute_objective(metrics)  # noqa: E731
    best = trainer.hyperparameter_search(rates, compute, n_trials=1, **study_options)
    assert len(seen) == 1  # of both sets
    assert best.objective == pytest.approx(seen[0]["eval_one_loss"] + seen[0]["eval_other_loss"])


def test_several_objectives(tmp_path, study_options):
    trainer = make(tmp_path, num_train_epochs=1)
    both = lambda metrics: (metrics["eval_loss"], metrics["eval_samples_per_second"])  # noqa: E731
    sampler = optuna.samplers.RandomSampler(seed=0)
    best = trainer.hyperparameter_search(rates, both, 4, ["minimize", "maximize"], sampler=sampler, **study_options)
    study = study_of(study_options)
    assert {run.run_id for run in best} == {str(trial.number) for trial in study.best_trials}
    assert {run.run_id: run.objective for run in best} == {str(trial.number): trial.values for trial in study.best_trials}
    with pytest.raises(ArgumentError, match="2 directions"):
        trainer.hyperparameter_search(rates, lambda metrics: 1.0, 1, ["minimize", "maximize"])


def test_early_stopping_restarts_in_each_trial(tmp_path, study_options):
    # the patience of the first trial's end would stop the second at once
    trainer = make(tmp_path, num_train_epochs=5)
    grid = optuna.samplers.GridSampler({"learning_rate": [1e-9, 3e-2]}, seed=0)
    space = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-9, 1.0)}  # noqa: E731
    trainer.hyperparameter_search(space, n_trials=2, sampler=grid, **study_options)
    good = next(trial for trial in study_of(study_options).trials if trial.params["learning_rate"] == 3e-2)
    assert len(good.intermediate_values) == 5


def test_a_name_that_no_argument_has(tmp_path):
    trainer = make(tmp_path)
    wrong = lambda trial: {"learning_rat": trial.suggest_float("learning_rat", 0.1, 0.2)}  # noqa: E731
    with pytest.raises(ArgumentError, match=r"no argument 'learning_rat'\. Did you mean 'learning_rate'"):
        trainer.hyperparameter_search(wrong, n_trials=1)
    with pytest.raises(ArgumentError, match="hp_space returned None"):
        trainer.hyperparameter_search(lambda trial: None, n_trials=1)


def test_an_error_ends_the_search_and_it_resumes(tmp_path, study_options):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.output_dir.endswith("run-1"):
                raise OSError("full")

    with pytest.raises(CallbackError, match=r"Fails\.on_step_end failed at step 1: OSError: full"):
        make(tmp_path, Fails()).hyperparameter_search(rates, n_trials=4, **study_options)
    assert states(study_of(study_options)) == ["COMPLETE", "FAIL"]
    make(tmp_path).hyperparameter_search(rates, n_trials=4, load_if_exists=True, **study_options)
    assert states(study_of(study_options)) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_a_diverging_trial_fails_and_the_search_continues(tmp_path, study_options, capsys):
    several = [1e-2, 1e30, 1e-3]

    def space(trial):
        return {"learning_rate": trial.suggest_categorical("learning_rate", several)}

    how = {"sampler": optuna.samplers.GridSampler({"learning_rate": several}, seed=0), "pruner": optuna.pruners.NopPruner()}
    best = make(tmp_path, num_train_epochs=1).hyperparameter_search(space, n_trials=3, catch=OSError, **how, **study_options)
    study = study_of(study_options)
    assert {trial.params["learning_rate"]: trial.state.name for trial in study.trials} == {
        1e-2: "COMPLETE",
        1e30: "FAIL",
        1e-3: "COMPLETE",
    }
    assert best.hyperparameters == {"learning_rate": 1e-2}
    assert "fail      -" in capsys.readouterr().out


def test_failed_trials_are_not_repeated(tmp_path, study_options):
    class Fails(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if args.output_dir.endswith("run-2"):
                raise OSError("full")

    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2) if trial.number != 1 else 1e30}

    with pytest.raises(CallbackError, match="full"):
        make(tmp_path, Fails()).hyperparameter_search(space, n_trials=4, **study_options)
    make(tmp_path).hyperparameter_search(space, n_trials=4, load_if_exists=True, **study_options)
    assert states(study_of(study_options)) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_callback_may_prune(tmp_path, study_options):
    class Prunes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.output_dir.endswith("run-0"):
                raise optuna.TrialPruned("enough")

    make(tmp_path, Prunes()).hyperparameter_search(rates, n_trials=2, **study_options)
    assert states(study_of(study_options)) == ["PRUNED", "COMPLETE"]


def test_a_finished_search_is_followed_by_another(tmp_path, study_options):
    for _ in range(2):
        make(tmp_path, num_train_epochs=1).hyperparameter_search(rates, n_trials=2, load_if_exists=True, **study_options)
    assert states(study_of(study_options)) == ["COMPLETE"] * 4


def test_options_of_optuna(tmp_path):
    called = []
    trainer = make(tmp_path, num_train_epochs=1)
    record = lambda study, trial: called.append(trial.number)  # noqa: E731
    trainer.hyperparameter_search(rates, n_trials=2, timeout=1e9, gc_after_trial=True, callbacks=[record])
    assert called == [0, 1]
    with pytest.raises(ArgumentError, match="none was started"):
        trainer.hyperparameter_search(rates, n_trials=5, timeout=-1.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_jobs": 2}, "n_jobs=2 .* threads .* backend='ray'"),
        ({"storag": "x"}, "takes 'storag'. Did you mean 'storage'"),
        ({"resources_per_trial": {}}, "takes 'resources_per_trial'"),
        ({"direction": "down"}, "direction='down'"),
        ({"direction": []}, r"direction=\[\]"),
        ({"n_trials": 0}, "n_trials=0"),
        ({"n_trials": 2.5}, "n_trials=2.5"),
    ],
)
def test_wrong_options(tmp_path, options, text):
    with pytest.raises(ArgumentError, match=text):
        make(tmp_path).hyperparameter_search(**({"hp_space": rates, "n_trials": 1, "backend": "optuna"} | options))


def test_what_a_search_needs(tmp_path):
    trainer = make(tmp_path)
    trainer.eval_dataset = None
    with pytest.raises(ArgumentError, match="eval_dataset"):
        trainer.hyperparameter_search(rates)
    other = fts.Trainer(trainer.model, trainer.args, train_dataset=[], eval_dataset=[{}])
    with pytest.raises(ArgumentError, match="model_init"):
        other.hyperparameter_search(rates)


def test_there_is_no_table_without_the_printer(tmp_path, capsys):
    trainer = make(tmp_path, num_train_epochs=1)
    trainer.remove_callback(PrinterCallback)
    capsys.readouterr()
    trainer.hyperparameter_search(rates, n_trials=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_killed_search_resumes_from_its_storage(tmp_path, storage):
    done = start("killed", tmp_path, storage=storage, n_trials=4, kill=[2, 8, int(signal.SIGKILL)])
    assert done.returncode == -signal.SIGKILL
    backend = optuna.storages.journal.JournalFileBackend(f"{tmp_path}/study.log")
    where = f"sqlite:///{tmp_path}/study.db" if storage == "sqlite" else optuna.storages.JournalStorage(backend)
    assert states(optuna.load_study(study_name="it", storage=where)) == ["COMPLETE", "COMPLETE", "RUNNING"]
    best = result(start("killed", tmp_path, storage=storage, n_trials=4))
    study = optuna.load_study(study_name="it", storage=where)
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert best["run_id"] == str(study.best_trial.number)
    assert sorted(path.name for path in tmp_path.glob("run-*")) == [f"run-{number}" for number in range(5)]


def test_several_processes_share_a_study(tmp_path):
    with ThreadPoolExecutor() as pool:  # each thread waits for its own process
        runs = [pool.submit(start, "killed", tmp_path, storage="journal", n_trials=3) for _ in range(2)]
    for run in runs:
        assert result(run.result())["objective"] > 0
    backend = optuna.storages.journal.JournalFileBackend(f"{tmp_path}/study.log")
    study = optuna.load_study(study_name="it", storage=optuna.storages.JournalStorage(backend))
    assert len(states(study)) == 6
    assert states(study).count("COMPLETE") >= 5
    assert set(states(study)) <= {"COMPLETE", "PRUNED"}  # optuna's pruner may end the sixth: it knows five by then
    assert len({trial.user_attrs["fts:search"] for trial in study.trials}) == 2
    assert {path.name for path in tmp_path.glob("run-*")} == {f"run-{number}" for number in range(6)}


def test_a_terminated_search_records_its_trial_as_failed(tmp_path):
    done = start("killed", tmp_path, storage="sqlite", n_trials=3, kill=[1, 8, int(signal.SIGTERM)])
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    sqlite = {"study_name": "it", "storage": f"sqlite:///{tmp_path}/study.db"}
    assert states(study_of(sqlite)) == ["COMPLETE", "FAIL"]
    assert (tmp_path / "run-1" / "checkpoint-8").is_dir()
    result(start("killed", tmp_path, storage="sqlite", n_trials=3))
    assert states(study_of(sqlite)) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_trial_of_a_running_process_is_not_touched(tmp_path, study_options):
    make(tmp_path, num_train_epochs=1).hyperparameter_search(rates, n_trials=1, **study_options)
    study = study_of(study_options)
    foreign = study.ask()
    foreign.set_user_attr("fts:search", "other")
    parent = {"host": os.uname().nodename, "pid": os.getppid(), "start": None}
    study.set_user_attr("fts:search:other", {"process": parent, "over": False})
    make(tmp_path, num_train_epochs=1).hyperparameter_search(rates, n_trials=1, load_if_exists=True, **study_options)
    assert states(study_of(study_options)) == ["COMPLETE", "RUNNING", "COMPLETE"]


def test_the_same_trials_as_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.trainer.helpers import Linear, make_examples

    options = {"learning_rate": 1e-4, "num_train_epochs": 2, "per_device_train_batch_size": 4, "eval_strategy": "epoch"}
    options |= {"disable_tqdm": True, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    found, trained = [], {}
    for kind, arguments in ((transformers.Trainer, transformers.TrainingArguments), (fts.Trainer, fts.TrainingArguments)):
        seen = trained[kind.__module__] = []

        def model_init(trial):
            seen.append(trial is None)  # noqa: B023 - called in this turn
            return Linear()

        args = arguments(str(tmp_path / kind.__module__), **options)
        trainer = kind(model_init=model_init, args=args, train_dataset=make_examples(22), eval_dataset=make_examples(10, seed=1))
        study_options = {"study_name": "it", "storage": optuna.storages.InMemoryStorage()}
        sampler = optuna.samplers.RandomSampler(seed=1)
        best = trainer.hyperparameter_search(rates, n_trials=3, backend="optuna", sampler=sampler, **study_options)
        found.append((best, study_of(study_options)))
    (theirs, their_study), (ours, our_study) = found
    assert [*trained.values()] == [[True, False, False, False]] * 2
    assert ours.run_id == theirs.run_id and ours.hyperparameters == theirs.hyperparameters
    for one, other in zip(their_study.trials, our_study.trials, strict=True):
        assert one.params == other.params
        assert other.intermediate_values == pytest.approx(one.intermediate_values, rel=1e-4)
