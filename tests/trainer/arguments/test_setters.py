"""The set_ methods have transformers' parameters and set what transformers sets."""

import dataclasses
import inspect

import pytest

from fts.errors import ArgumentError, MissingDependencyError
from fts.trainer.arguments import TrainingArguments, tracker_packages

CALLS = [
    ("set_training", {}),
    ("set_training", {"learning_rate": 1e-4, "batch_size": 32, "num_epochs": 2, "seed": 3, "activation_checkpointing": True}),
    ("set_training", {"max_steps": 5, "gradient_accumulation_steps": 4, "weight_decay": 0.1}),
    ("set_evaluate", {}),
    (
        "set_evaluate",
        {"strategy": "steps", "steps": 100, "batch_size": 3, "accumulation_steps": 2, "delay": 2, "loss_only": True},
    ),
    ("set_testing", {"batch_size": 32, "loss_only": True}),
    ("set_save", {"strategy": "epoch", "total_limit": 2, "on_each_node": True}),
    ("set_save", {"strategy": "steps", "steps": 100}),
    ("set_logging", {}),
    ("set_logging", {"strategy": "steps", "steps": 100, "level": "info", "first_step": True, "nan_inf_filter": True}),
    ("set_optimizer", {"name": "sgd", "learning_rate": 0.1, "beta1": 0.8, "args": "momentum=0.9"}),
    ("set_lr_scheduler", {"name": "cosine", "warmup_steps": 0.05, "max_steps": 9}),
    (
        "set_dataloader",
        {"train_batch_size": 16, "eval_batch_size": 64, "num_workers": 2, "prefetch_factor": 2, "sampler_seed": 1},
    ),
    ("set_push_to_hub", {"model_id": "me/awesome-model"}),
    ("set_push_to_hub", {"model_id": "it", "strategy": "checkpoint", "token": "t", "private_repo": True, "revision": "dev"}),
    ("set_dataloader", {"drop_last": True, "pin_memory": False, "auto_find_batch_size": True, "ignore_data_skip": True}),
]
NAMES = sorted({name for name, _ in CALLS})


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_defaults_are_those_of_transformers(name):
    theirs = pytest.importorskip("transformers").TrainingArguments

    def of(cls):
        return [(item.name, item.default) for item in inspect.signature(getattr(cls, name)).parameters.values()]

    assert of(TrainingArguments) == of(theirs)


@pytest.mark.parametrize(("name", "settings"), CALLS, ids=str)
def test_they_set_what_transformers_sets(name, settings):
    transformers = pytest.importorskip("transformers")
    ours, theirs = TrainingArguments(optim="adamw_torch"), transformers.TrainingArguments(optim="adamw_torch")
    assert getattr(ours, name)(**settings) is ours
    getattr(theirs, name)(**settings)
    skipped = {"accelerator_config", "trackio_space_id"}
    normalised = {"report_to": [], "eval_delay": ours.eval_delay or 0}  # theirs become "none" and None
    for field in dataclasses.fields(theirs):
        if field.name not in skipped:
            expected = getattr(theirs, field.name)
            expected = normalised[field.name] if field.name in normalised and expected in ("none", None) else expected
            assert getattr(ours, field.name) == expected, field.name


def test_both_names_of_checkpointing_are_taken():
    args = TrainingArguments().set_training(gradient_checkpointing=True)
    assert args.activation_checkpointing is args.gradient_checkpointing is True


@pytest.mark.parametrize("name", ["set_evaluate", "set_save", "set_logging"])
def test_steps_need_a_number(name):
    with pytest.raises(ArgumentError, match="steps=0 with strategy='steps'"):
        getattr(TrainingArguments(), name)(strategy="steps", steps=0)


def test_set_logging_checks_trackers(monkeypatch):
    monkeypatch.setattr(tracker_packages, "_is_found", lambda module: module == "mlflow")
    assert TrainingArguments().set_logging(report_to=["mlflow"]).report_to == ["mlflow"]
    with pytest.raises(MissingDependencyError, match="needs the package wandb"):
        TrainingArguments().set_logging(report_to="wandb")
