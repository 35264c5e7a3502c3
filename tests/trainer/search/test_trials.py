import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import ClassVar

import optuna
import pytest
import torch

from fts.errors import ArgumentError
from fts.trainer import Trainer, TrainerCallback
from fts.trainer.search.trial_arguments import with_trial_values
from fts.trainer.search.trials import copy_for_trial, offload_model
from tests.trainer.search.search_jobs import CountsSteps, make, rates, result, run_result, start

VALUES = {
    "learning_rate": 0.03,
    "seed": 7,
    "per_device_train_batch_size": 6,
    "label_smoothing_factor": 0.0,
    "num_train_epochs": 2,
}


class RecordsRuns(Trainer):
    """Records the results of its runs in the class, and has a list in the instance."""

    runs: ClassVar[list] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own_list = []

    def train(self, *args, **kwargs):
        self.own_list.append(1)
        output = super().train(*args, **kwargs)
        self.runs.append((len(self.own_list), run_result(self), self.state, dict(vars(self.args))))
        return output


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(RecordsRuns, "runs", [])
    monkeypatch.setattr("tests.trainer.search.search_jobs.Trainer", RecordsRuns)
    return RecordsRuns


def test_each_trial_equals_a_run_of_a_fresh_process(tmp_path, recorded):
    several = [VALUES, {"learning_rate": 0.05, "seed": 3, "lr_scheduler_type": "cosine", "warmup_steps": 3}, VALUES]
    trainer = make(tmp_path / "search")
    trainer.hyperparameter_search(lambda trial: several[trial.number], n_trials=3, backend="optuna")
    assert [count for count, *_ in recorded.runs] == [1, 1, 1]
    for number in (1, 2):  # the first has no trial before it
        assert recorded.runs[number][1] == result(start("single_run", tmp_path / f"single-{number}", **several[number]))
    assert recorded.runs[0][1] == recorded.runs[2][1] != recorded.runs[1][1]


def test_the_trainer_stays_unchanged(tmp_path, recorded):
    trainer = make(tmp_path)
    before, counts = dict(vars(trainer.args)), trainer.callback_handler.callbacks[1]
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.hyperparameter_search(rates, n_trials=2, backend="optuna")
    assert vars(trainer.args) == before
    assert isinstance(counts, CountsSteps) and (counts.count, counts.steps) == (0, [])
    assert trainer.state.log_history == [] and trainer.own_list == [] and trainer.hp_name is None
    assert all(value.equal(weights[name]) for name, value in trainer.model.state_dict().items())


def test_a_copy_for_a_trial_equals_a_trainer_made_with_the_arguments(tmp_path):
    changes = {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2}
    changes |= {"per_device_train_batch_size": 3, "logging_steps": 5, "skip_memory_metrics": False}
    trainer = make(tmp_path)
    args = with_trial_values(trainer.args, changes, for_model=False)
    found, expected = vars(copy_for_trial(trainer, args)), vars(make(tmp_path, **changes))
    assert found.keys() == expected.keys()
    plain = [name for name, value in expected.items() if isinstance(value, (int, float, str, bool, type(None), list))]
    assert len(plain) > 10
    assert [
        name for name in plain if name not in ("train_dataset", "eval_dataset", "start_time") and found[name] != expected[name]
    ] == []
    assert found["label_smoothing"].__class__ is expected["label_smoothing"].__class__
    assert found["memory"].rss is not None
    assert vars(args).items() >= {name: vars(expected["args"])[name] for name in (*changes, "eval_steps")}.items()


def test_callbacks_that_refer_to_the_trainer_refer_to_the_copy(tmp_path):
    found = []

    class HasTrainer(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            found.append((self.trainer is not trainer, self.trainer.model is model, self.trainer.args is args))

    callback = HasTrainer()
    trainer = make(tmp_path, callback)
    callback.trainer = trainer
    trainer.hyperparameter_search(rates, n_trials=1, backend="optuna")
    assert found == [(True, True, True)]


def test_data_and_running_uploads_are_not_copied(tmp_path):
    trainer = make(tmp_path)
    trainer.hub_session.uploads._last = Future()
    copied = copy_for_trial(trainer, trainer.args)
    assert copied.train_dataset is trainer.train_dataset and copied.eval_dataset is trainer.eval_dataset
    assert copied.callback_handler is not trainer.callback_handler and not copied.hub_session.uploads.busy


def test_what_cannot_be_copied_is_named(tmp_path):
    class Locked(TrainerCallback):
        def __init__(self):
            self.lock = threading.Lock()

    with pytest.raises(ArgumentError, match=r"the callback Locked, which cannot be copied: TypeError.*lock"):
        make(tmp_path, Locked()).hyperparameter_search(rates, n_trials=1, backend="optuna")
    trainer = make(tmp_path)
    trainer.file = open(tmp_path / "x", "w")  # noqa: SIM115
    with trainer.file, pytest.raises(ArgumentError, match=r"Trainer\.file, which cannot be copied"):
        trainer.hyperparameter_search(rates, n_trials=1, backend="optuna")


def test_a_callback_may_be_shared(tmp_path):
    class Shared(TrainerCallback):
        def __deepcopy__(self, memo):
            return self

        def on_train_end(self, args, state, control, **kwargs):
            self.last = state.global_step

    shared = Shared()
    make(tmp_path, shared).hyperparameter_search(rates, n_trials=1, backend="optuna")
    assert shared.last > 0


def test_the_state_says_which_trial_it_is(tmp_path, recorded):
    trainer = make(tmp_path)
    trainer.hyperparameter_search(rates, n_trials=2, backend="optuna", hp_name=lambda trial: f"try-{trial.number}")
    states = [state for *_, state, _ in recorded.runs]
    assert [state.trial_name for state in states] == ["try-0", "try-1"]
    assert all(state.is_hyper_param_search and state.trial_params.keys() == {"learning_rate"} for state in states)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["try-0", "try-1"]
    saved = type(states[0]).load_from_json(next((tmp_path / "try-1").glob("checkpoint-*")) / "trainer_state.json")
    assert (saved.trial_name, saved.trial_params, saved.is_hyper_param_search) == ("try-1", states[1].trial_params, True)


def test_without_a_search_a_trial_may_be_a_dictionary(tmp_path):
    made = []
    trainer = make(tmp_path)
    inner = trainer.model_init
    trainer.model_init = lambda trial: made.append(trial) or inner()
    trainer.train(trial={"layers": 2})
    assert made == [{"layers": 2}] and trainer.state.trial_params == {"layers": 2} and trainer.state.trial_name is None
    trainer.train()
    assert trainer.state.trial_params is None and not trainer.state.is_hyper_param_search


@pytest.mark.parametrize("name", ["a/b", "", "..", 3])
def test_a_name_that_cannot_be_a_folder(tmp_path, name):
    with pytest.raises(ArgumentError, match="hp_name returned"):
        make(tmp_path).hyperparameter_search(rates, n_trials=1, backend="optuna", hp_name=lambda trial: name)


def test_checkpoints_of_another_search_cause_a_warning(tmp_path, caplog):
    make(tmp_path).hyperparameter_search(rates, n_trials=1, backend="optuna")
    assert "has checkpoints of another" not in caplog.text
    make(tmp_path).hyperparameter_search(rates, n_trials=1, backend="optuna")
    assert "has checkpoints of another one: checkpoint-6" in caplog.text


def test_model_init_gets_the_trial(tmp_path):
    seen = []
    trainer = make(tmp_path)
    inner = trainer.model_init

    def model_init(trial):
        seen.append(trial.suggest_categorical("dropout", [0.0, 0.5]))
        return inner(dropout=seen[-1])

    trainer.model_init = model_init
    best = trainer.hyperparameter_search(rates, n_trials=2, backend="optuna")
    assert best.hyperparameters.keys() == {"learning_rate", "dropout"} and len(seen) == 2


def test_the_trainers_model_is_offloaded_during_trials():
    class Moves(torch.nn.Module):
        def to(self, device):
            moves.append(str(device))

    for placed, expected in ((None, ["cpu", "within", "cuda:0"]), (False, ["within"])):
        moves = []
        args = SimpleNamespace(device=torch.device("cuda", 0), place_model_on_device=placed)
        with offload_model(Moves(), args):
            moves.append("within")
        assert moves == expected


def test_memory_stays_over_20_trials(tmp_path):
    found = result(start("memory", tmp_path, n_trials=20))
    resident, trainers, modules = zip(*found, strict=True)
    assert len(found) == 20
    assert resident[-1] - resident[0] < 12, resident  # the weights of one trial alone
    assert set(trainers) == {trainers[0]} and set(modules) == {modules[0]}


def test_trials_share_no_random_state(tmp_path):
    drawn = []

    def noisy(metrics):
        drawn.append(torch.rand(()).item())
        return metrics["eval_loss"]

    make(tmp_path).hyperparameter_search(lambda trial: {"num_train_epochs": 1}, noisy, n_trials=3, backend="optuna")
    assert len(set(drawn)) == 1


def test_the_study_has_the_objective_of_each_trial(tmp_path, recorded):
    study = optuna.create_study
    made = []

    def noted(**options):
        made.append(study(**options))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna, "create_study", noted)
        make(tmp_path).hyperparameter_search(rates, n_trials=2, backend="optuna")
    objectives = [trial.value for trial in made[0].trials]
    assert objectives == [
        [log["eval_loss"] for log in state.log_history if "eval_loss" in log][-1] for *_, state, _ in recorded.runs
    ]
