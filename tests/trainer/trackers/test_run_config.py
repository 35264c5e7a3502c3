"""The configuration of a run that trackers store, without secrets."""

import attrs
import pytest
import torch
from torch import nn

from fts.trainer import TrainingArguments
from fts.trainer.run.plan import make_plan
from fts.trainer.trackers.logs import numeric_logs, rewrite_logs
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


def test_the_config_has_arguments_plan_model_and_environment():
    args = TrainingArguments("out", learning_rate=0.25, label_names=["a"], use_cpu=True)
    model = Configured(hidden_size=8, architectures=["Net"])
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    model.register_parameter("frozen", frozen)
    config = run_config(args, make_plan(args, batches=10, num_examples=80), model)
    assert config["learning_rate"] == 0.25 and config["label_names"] == "['a']"
    assert config["plan/total_steps"] == 30 and config["plan/precision"] == "None"
    assert "plan/schedule" not in config
    assert (config["model/hidden_size"], config["model/architectures"], config["model/class"]) == (8, "['Net']", "Configured")
    assert (config["model/num_parameters"], config["model/num_trainable_parameters"]) == (7, 4)
    assert config["environment/torch"] == torch.__version__ and config["environment/device"] == "cpu"
    assert all(type(value) in (bool, int, float, str) for value in config.values())


@pytest.mark.parametrize("name", ["token", "auth_token", "api_key", "wandb_api_key", "password", "client_secret", "ACCESS_KEY"])
def test_secrets_are_left_out_by_name(name):
    config = run_config(
        TrainingArguments("out", hub_token="sesame"),
        None,
        Configured(**{name: "sesame", "inner": {name: "sesame", "deep": [{name: "sesame"}]}}),
    )
    assert "sesame" not in str(config)
    assert f"model/{name}" not in config and config["model/inner"] == "{'deep': [{}]}"


def test_names_that_only_resemble_secrets_are_kept():
    config = run_config(TrainingArguments("out"), None, Configured(pad_token_id=3, num_key_value_heads=4, tokenizer_class="Bert"))
    assert (config["model/pad_token_id"], config["model/num_key_value_heads"], config["model/tokenizer_class"]) == (3, 4, "Bert")


@pytest.mark.parametrize("url", ["https://me:sesame@host/x", "s3://sesame@host/x", "postgresql://me:sesame@db:5432/runs"])
def test_logins_in_urls_are_masked(url):
    config = run_config(TrainingArguments(url, run_name=url), None, Configured(source=[url]))
    assert "sesame" not in str(config)
    assert config["run_name"].partition("@")[2] == url.partition("@")[2]


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

    from tests.trainer.helpers import make_examples, make_trainer

    settings = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "report_to": "tensorboard"}
    make_trainer(tmp_path / "ours", **settings).train()
    theirs = transformers.TrainingArguments(
        str(tmp_path / "theirs"), use_cpu=True, save_strategy="no", disable_tqdm=True, **settings
    )
    transformers.Trainer(Linear(), theirs, train_dataset=make_examples(22), eval_dataset=make_examples(10, seed=1)).train()

    def tags(side):
        (folder,) = (tmp_path / side / "runs").iterdir()
        events = EventAccumulator(str(folder))
        events.Reload()
        return {tag: [one.step for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    assert tags("ours") == tags("theirs")


def test_a_split_prefix_needs_a_name_after_it():
    assert rewrite_logs({"eval": 1.0, "evaluation_loss": 2.0, "test_eval_f1": 3.0}) == {
        "train/eval": 1.0,
        "train/evaluation_loss": 2.0,
        "test/eval_f1": 3.0,
    }
