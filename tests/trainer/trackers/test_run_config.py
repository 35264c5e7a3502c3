"""What a tracker is told of a run: all of it, and no secret."""

import attrs
import pytest
import torch
from torch import nn

from fts.trainer import TrainingArguments
from fts.trainer.run.plan import make_plan
from fts.trainer.trackers.logs import (rewrite_logs, numeric_logs)
from fts.trainer.trackers.run_config import run_config
from tests.trainer.helpers import Linear


@attrs.frozen
class Config:
    values: dict

    def to_dict(self):
        return self.values


class Configured(Linear):
    def __init__(self, **values):
        super().__init__()
        self.config = Config(values)


def test_arguments_plan_model_and_environment_are_told():
    args = TrainingArguments("out", learning_rate=0.25, label_names=["a"], use_cpu=True)
    model = Configured(hidden_size=8, architectures=["Net"])
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    model.register_parameter("frozen", frozen)
    facts = run_config(args, make_plan(args, batches=10, items=80), model)
    assert facts["learning_rate"] == 0.25 and facts["label_names"] == "['a']"
    assert facts["plan/total_steps"] == 30 and facts["plan/precision"] == "None"
    assert "plan/schedule" not in facts
    assert (facts["model/hidden_size"], facts["model/architectures"], facts["model/class"]) == (8, "['Net']", "Configured")
    assert (facts["model/num_parameters"], facts["model/num_trainable_parameters"]) == (7, 4)
    assert facts["environment/torch"] == torch.__version__ and facts["environment/device"] == "cpu"
    assert all(type(value) in (bool, int, float, str) for value in facts.values())


@pytest.mark.parametrize("name", ["token", "auth_token", "api_key", "wandb_api_key", "password", "client_secret", "ACCESS_KEY"])
def test_what_is_called_a_secret_is_left_out(name):
    facts = run_config(
        TrainingArguments("out", hub_token="sesame"),
        None,
        Configured(**{name: "sesame", "inner": {name: "sesame", "deep": [{name: "sesame"}]}}),
    )
    assert "sesame" not in str(facts)
    assert f"model/{name}" not in facts and facts["model/inner"] == "{'deep': [{}]}"


def test_what_only_sounds_like_one_is_told():
    facts = run_config(TrainingArguments("out"), None, Configured(pad_token_id=3, num_key_value_heads=4, tokenizer_class="Bert"))
    assert (facts["model/pad_token_id"], facts["model/num_key_value_heads"], facts["model/tokenizer_class"]) == (3, 4, "Bert")


@pytest.mark.parametrize("address", ["https://me:sesame@host/x", "s3://sesame@host/x", "postgresql://me:sesame@db:5432/runs"])
def test_logins_in_addresses_are_masked(address):
    facts = run_config(TrainingArguments(address, run_name=address), None, Configured(source=[address]))
    assert "sesame" not in str(facts)
    assert facts["run_name"].partition("@")[2] == address.partition("@")[2]


def test_the_model_keeps_its_configuration():
    values = {"inner": {"api_key": "sesame"}}
    run_config(TrainingArguments("out"), None, Configured(**values))
    assert values == {"inner": {"api_key": "sesame"}}


def test_numbers_of_all_kinds_are_numbers():
    logs = {"a": torch.tensor(0.5), "b": torch.tensor([0.5]).numpy(), "c": True, "d": float("nan"), "e": torch.ones(2), "f": "x"}
    found = numeric_logs(logs)
    assert list(found) == ["a", "b", "c", "d"]
    assert (found["a"], found["b"], found["c"]) == (0.5, 0.5, True)
    assert all(type(value) in (float, bool) for value in found.values())


def test_names_are_those_that_transformers_writes(tmp_path):
    pytest.importorskip("tensorboard")
    transformers = pytest.importorskip("transformers")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tests.trainer.helpers import make_trainer, rows

    settings = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "report_to": "tensorboard"}
    make_trainer(tmp_path / "ours", **settings).train()
    theirs = transformers.TrainingArguments(
        str(tmp_path / "theirs"), use_cpu=True, save_strategy="no", disable_tqdm=True, **settings
    )
    transformers.Trainer(Linear(), theirs, train_dataset=rows(22), eval_dataset=rows(10, seed=1)).train()

    def tags(side):
        (folder,) = (tmp_path / side / "runs").iterdir()
        events = EventAccumulator(str(folder))
        events.Reload()
        return {tag: [one.step for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    assert tags("ours") == tags("theirs")


def test_a_split_needs_a_name_behind_it():
    assert rewrite_logs({"eval": 1.0, "evaluation_loss": 2.0, "test_eval_f1": 3.0}) == {
        "train/eval": 1.0,
        "train/evaluation_loss": 2.0,
        "test/eval_f1": 3.0,
    }
