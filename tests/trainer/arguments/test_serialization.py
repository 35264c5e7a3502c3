"""Arguments as plain values and as a string."""

import json

import pytest
import torch

from fts.trainer.arguments import TrainingArguments
from fts.trainer.arguments.enums import IntervalStrategy


def test_enums_lists_and_dtypes_become_plain():
    kwargs = {"dtype": torch.bfloat16, "inner": {"dtype": torch.float32}}
    args = TrainingArguments(eval_strategy="epoch", debug="underflow_overflow", gradient_checkpointing_kwargs=kwargs)
    plain = args.to_dict()
    assert type(plain["eval_strategy"]) is type(plain["debug"][0]) is str
    assert plain["gradient_checkpointing_kwargs"] == {"dtype": "bfloat16", "inner": {"dtype": "float32"}}
    assert args.gradient_checkpointing_kwargs["dtype"] is torch.bfloat16  # the arguments keep what they had
    assert args.eval_strategy is IntervalStrategy.EPOCH
    assert json.loads(args.to_json_string()) == plain


@pytest.mark.parametrize("token", [None, "sesame"])
def test_tokens_are_masked(token):
    args = TrainingArguments(hub_token=token)
    assert args.to_dict()["hub_token"] == args.to_sanitized_dict()["hub_token"] == "<HUB_TOKEN>"
    assert "sesame" not in args.to_json_string() + str(args) + repr(args)
    assert args.hub_token == token
    assert TrainingArguments(**args.to_dict()).hub_token is None  # the mask is no token


def test_what_a_tracker_can_hold():
    values = TrainingArguments(label_names=["a"], per_device_train_batch_size=3).to_sanitized_dict()
    assert values["train_batch_size"] == 3
    assert values["label_names"] == "['a']"
    assert values["max_steps"] == -1
    assert values["eval_steps"] == "None"
    assert all(type(value) in (bool, int, float, str) for value in values.values())


def test_the_string_is_like_that_of_transformers():
    theirs = pytest.importorskip("transformers").TrainingArguments
    ours, others = str(TrainingArguments("x")).splitlines(), str(theirs("x")).splitlines()
    names = [line.split("=")[0] for line in others]
    assert [line.split("=")[0] for line in ours if line.split("=")[0] in names] == names
    assert repr(TrainingArguments("x")) == str(TrainingArguments("x"))
