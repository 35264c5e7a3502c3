import logging
import math
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fts.errors import ArgumentError
from fts.trainer import TrainerCallback
from tests.trainer.search.search_jobs import ROOT, make
from tests.trainer.search.test_docs import BLOCKS

ray = pytest.importorskip("ray")
tune = pytest.importorskip("ray.tune")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A local Ray of two workers, without usage reports."""
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(tmp_path_factory.getbasetemp())}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (own | {"PYTHONPATH": str(ROOT)}).items():
            patch.setenv(name, value)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


class WaitsForTwo(TrainerCallback):
    """Waits until two trials have started, which requires that they run in parallel."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        (self.folder / f"pid-{os.getpid()}").write_text(logging.getLevelName(logging.getLogger("fts").level))
        while len([*self.folder.glob("pid-*")]) < 2:
            time.sleep(0.01)


def rates(_):
    return {"learning_rate": tune.grid_search([1e-4, 3e-2])}


def test_two_trials_run_in_parallel_and_the_better_rate_is_found(cluster, tmp_path):
    level = logging.getLogger("fts").level
    started = tmp_path / "started"
    started.mkdir()
    scheduler = tune.schedulers.ASHAScheduler(metric="objective", mode="min", grace_period=1, max_t=10, reduction_factor=2)
    trainer = make(tmp_path / "out", WaitsForTwo(started), log_level="error")
    best = trainer.hyperparameter_search(
        rates, n_trials=1, backend="ray", storage_path=str(tmp_path / "ray"), scheduler=scheduler, verbose=0
    )
    trials = {trial.config["learning_rate"]: trial for trial in best.run_summary.trials}
    assert len(trials) == 2
    assert [path.read_text() for path in started.glob("pid-*")] == ["ERROR"] * 2  # the workers have the settings of this process
    assert best.hyperparameters == {"learning_rate": 3e-2} and best.run_id == trials[3e-2].trial_id
    assert best.objective == trials[3e-2].last_result["eval_loss"] < trials[1e-4].last_result["eval_loss"]
    assert trials[3e-2].last_result["step"] == 18  # and each evaluation was reported
    assert trials[3e-2].last_result["training_iteration"] == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"run-{trial.trial_id}" for trial in trials.values()}

    single = make(tmp_path / "single", learning_rate=3e-2, load_best_model_at_end=False)
    single.train()
    saved = load_file(tmp_path / "out" / f"run-{best.run_id}" / "checkpoint-18" / "model.safetensors")
    assert all(saved[name].equal(value) for name, value in single.model.state_dict().items() if name in saved)
    assert trainer.args.learning_rate == 1e-4 and trainer.model is not None
    logging.getLogger("fts").setLevel(level)


def test_a_scheduler_stops_trials(cluster, tmp_path):
    class Stop(tune.Stopper):
        def __call__(self, trial_id, result):
            return result["config"]["learning_rate"] < 1e-2

        def stop_all(self):
            return False

    trainer = make(tmp_path)
    trainer.model_init = type(trainer.model_init())
    name = {"hp_name": lambda config: f"rate-{config['learning_rate']}"}
    options = {"storage_path": str(tmp_path / "ray"), "stop": Stop(), "verbose": 0, "ray_scope": "all", "reuse_actors": True}
    several = lambda _: {"learning_rate": tune.grid_search([1e-4, 3e-2, 1e30])}  # noqa: E731
    best = trainer.hyperparameter_search(several, n_trials=1, backend="ray", **name, **options)
    trials = {trial.config["learning_rate"]: trial for trial in best.run_summary.trials}
    assert {rate: trial.last_result["training_iteration"] for rate, trial in trials.items()} == {1e-4: 1, 3e-2: 3, 1e30: 1}
    assert math.isnan(trials[1e30].last_result["objective"])  # it diverged
    assert best.hyperparameters == {"learning_rate": 3e-2}
    assert (tmp_path / "rate-0.03" / "checkpoint-18").is_dir() and not (tmp_path / "rate-0.0001" / "checkpoint-18").exists()


def test_the_examples_of_the_page_run(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}  # its classes are pickled by value, like those of a script
    exec(BLOCKS[0].split("best =")[0], space)
    exec(BLOCKS[2].replace('backend="ray",', f'backend="ray", storage_path={str(tmp_path / "ray")!r}, verbose=0,'), space)
    assert space["best"].hyperparameters == {"learning_rate": 0.1}


def test_what_cannot_be_sent_is_named(tmp_path):
    class Locked(TrainerCallback):
        def __init__(self):
            self.lock = threading.Lock()

        def __deepcopy__(self, memo):
            return self

    with pytest.raises(ArgumentError, match=r"cannot be sent: the callback Locked .*lock.*backend='optuna'"):
        make(tmp_path, Locked()).hyperparameter_search(rates, backend="ray")
    trainer, lock = make(tmp_path), threading.Lock()
    trainer.compute_metrics = lambda found: {"locked": lock.locked()}
    with pytest.raises(ArgumentError, match=r"Trainer\.compute_metrics \(TypeError"):
        trainer.hyperparameter_search(rates, backend="ray")


def test_a_trained_trainer_can_be_sent_to_workers(tmp_path):
    from fts.trainer.search.ray_backend import copy_for_workers

    trainer = make(tmp_path, disable_tqdm=False, max_steps=3, skip_memory_metrics=False)
    trainer.train()
    trainer.evaluate()
    assert trainer.accelerator is not None
    trainer.create_optimizer_and_scheduler(3)
    received = ray.cloudpickle.loads(ray.cloudpickle.dumps(copy_for_workers(trainer)))
    assert received.model is None and received._accelerator is None and received.optimizer is None
    assert Path(received.args.output_dir).is_absolute()
    assert trainer.model is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"direction": ["minimize", "maximize"]}, "one objective. Use backend='optuna'"),
        ({"storag_path": "x"}, "takes 'storag_path'. Did you mean 'storage_path'"),
        ({"num_samples": 3}, "takes 'num_samples'"),
        ({"hp_space": lambda trial: None}, "hp_space returned None"),
        ({"scheduler": tune.schedulers.PopulationBasedTraining(hyperparam_mutations={"seed": [1]})}, "PopulationBasedTraining"),
    ],
)
def test_wrong_options(tmp_path, options, text):
    with pytest.raises(ArgumentError, match=text):
        make(tmp_path).hyperparameter_search(**({"hp_space": rates, "n_trials": 1, "backend": "ray"} | options))
