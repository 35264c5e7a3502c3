"""AcceleratorConfig is transformers', and is taken in every form."""

import dataclasses
import json

import pytest

from fts.errors import ArgumentError
from fts.trainer.arguments import AcceleratorConfig, TrainingArguments, check_num_steps


def test_fields_and_defaults_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.trainer_pt_utils").AcceleratorConfig
    assert AcceleratorConfig().to_dict() == theirs().to_dict()
    assert TrainingArguments(accelerator_config=theirs(split_batches=True)).accelerator_config == AcceleratorConfig(
        split_batches=True
    )


@pytest.mark.parametrize("form", ["dict", "json", "path", "object"])
def test_every_form_is_taken(form, tmp_path):
    values = {"even_batches": False, "gradient_accumulation_kwargs": {"sync_each_batch": True}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    forms = {"dict": values, "json": json.dumps(values), "path": str(path), "object": AcceleratorConfig(**values)}
    args = TrainingArguments(accelerator_config=forms[form])
    assert args.accelerator_config == AcceleratorConfig(**values)
    assert args.to_dict()["accelerator_config"] == {**AcceleratorConfig().to_dict(), **values}
    args.accelerator_config = None
    assert args.accelerator_config == AcceleratorConfig()


@pytest.mark.parametrize("error", [ArgumentError, ValueError, NotImplementedError])
def test_the_class_is_not_an_instance(error):
    with pytest.raises(error, match="Tried passing in a callable to `accelerator_config`"):
        TrainingArguments(accelerator_config=AcceleratorConfig)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"split_batch": True}, "AcceleratorConfig has no argument 'split_batch'. Did you mean 'split_batches'"),
        ({"split_batches": "yes"}, "split_batches='yes' must be True or False"),
        ({"dispatch_batches": 1}, "dispatch_batches=1 must be True, False or None"),
        ({"gradient_accumulation_kwargs": 3}, "gradient_accumulation_kwargs=3 must be a dict"),
        ({"gradient_accumulation_kwargs": {"num_steps": 0}}, "num_steps=0 must be a whole number"),
        ("nowhere.json", "accelerator_config='nowhere.json' is no readable JSON file .* Give the path of one"),
        (3, "accelerator_config=3 must be a dict"),
    ],
)
def test_what_cannot_work(value, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingArguments(accelerator_config=value)


def test_num_steps():
    check_num_steps(AcceleratorConfig().gradient_accumulation_kwargs, 3)
    for steps in (1, 3):
        check_num_steps({"num_steps": steps}, 3)
    with pytest.raises(ArgumentError, match="The `AcceleratorConfig`'s `num_steps` is set but"):
        check_num_steps({"num_steps": 10}, 2)


def test_copies_share_nothing():
    config = AcceleratorConfig(gradient_accumulation_kwargs={"num_steps": 1})
    config.to_dict()["gradient_accumulation_kwargs"]["num_steps"] = 5
    assert config.gradient_accumulation_kwargs == {"num_steps": 1}
    assert config.pop("gradient_accumulation_kwargs") == {"num_steps": 1}
    assert config.pop("nothing", 3) == 3
    assert dataclasses.asdict(config) == AcceleratorConfig().to_dict()
