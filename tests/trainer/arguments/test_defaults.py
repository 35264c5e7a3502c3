"""The names and defaults are those of the documentation and of transformers; every difference is listed below."""

import ast
import csv
import dataclasses
import os
from pathlib import Path

import pytest

from fts.trainer.arguments import AcceleratorConfig, Seq2SeqTrainingArguments, TrainingArguments
from fts.trainer.arguments.validators import VALIDATORS

with open(Path(__file__).with_name("documented.tsv")) as table:
    DOCUMENTED = list(csv.DictReader(table, delimiter="\t"))
OURS = {"TrainingArguments": TrainingArguments, "Seq2SeqTrainingArguments": Seq2SeqTrainingArguments}

NOT_IN_TRANSFORMERS = {  # documented, gone from newer versions; and what is fts' own
    *("group_by_length", "save_safetensors"),
    *("async_save", "save_every", "max_time", "nonfinite", "nonfinite_limit"),
}
DIFFERENT_FROM_TRANSFORMERS = {  # ours is the documented default
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "trackio_space_id": ("trackio", None),
}
SHOWN_BY_THE_OBJECT = {  # the documentation gives what an object shows; on the class they are None, as in transformers
    "output_dir": "trainer_output",
    "gradient_checkpointing": False,
}
OTHERS_IN_WORDS = {"report_to": "none", "eval_delay": 0, "debug": "", "do_eval": False}


def default_of(field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def parsed(text):
    if text == "":
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@pytest.mark.parametrize("row", DOCUMENTED, ids=lambda row: row["name"])
def test_each_documented_argument_has_its_default(row):
    cls, name = OURS[row["class"]], row["name"]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    assert name in fields
    expected = OTHERS_IN_WORDS.get(name, parsed(row["documented_default"]))
    if name in SHOWN_BY_THE_OBJECT:
        assert default_of(fields[name]) is None
        assert getattr(cls(), name) == SHOWN_BY_THE_OBJECT[name] == expected
    else:
        assert default_of(fields[name]) == expected


@pytest.mark.parametrize("name", ["TrainingArguments", "Seq2SeqTrainingArguments"])
def test_names_and_defaults_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    ours = {field.name: default_of(field) for field in dataclasses.fields(OURS[name])}
    theirs = {field.name: default_of(field) for field in dataclasses.fields(getattr(transformers, name))}
    assert set(ours) - set(theirs) == NOT_IN_TRANSFORMERS
    assert set(theirs) <= set(ours)
    assert {key: (ours[key], theirs[key]) for key in theirs if ours[key] != theirs[key]} == DIFFERENT_FROM_TRANSFORMERS


def test_the_fields_have_the_order_of_transformers_so_that_positions_mean_the_same():
    transformers = pytest.importorskip("transformers")
    ours = [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in NOT_IN_TRANSFORMERS]
    theirs = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
    assert ours == theirs
    assert {field.name for field in dataclasses.fields(TrainingArguments)[len(theirs) :]} == NOT_IN_TRANSFORMERS


def test_defaults_can_be_read_on_the_class():
    for field in dataclasses.fields(Seq2SeqTrainingArguments):
        if field.default is not dataclasses.MISSING:
            assert getattr(Seq2SeqTrainingArguments, field.name) == field.default


def test_every_argument_is_explained_in_words_that_a_parser_can_print():
    for field in dataclasses.fields(Seq2SeqTrainingArguments):
        assert len(field.metadata["help"]) > 5
        assert field.metadata["help"] % () == field.metadata["help"]


def test_every_argument_has_a_check():
    names = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert names <= set(VALIDATORS)
    assert set(VALIDATORS) <= names


def test_defaults_pass_their_checks_and_a_list_is_not_shared():
    assert TrainingArguments().include_for_metrics is not TrainingArguments().include_for_metrics
    assert Seq2SeqTrainingArguments().accelerator_config == AcceleratorConfig()


SETTINGS = [
    {},
    {"output_dir": "~/x"},
    {"eval_strategy": "steps", "logging_steps": 10},
    {"eval_strategy": "steps", "eval_steps": 0.25, "save_steps": 0.5, "load_best_model_at_end": True},
    {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
    {"metric_for_best_model": "eval_loss"},
    {"metric_for_best_model": "f1", "greater_is_better": False},
    {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"num_cycles": "2"}', "warmup_steps": 0.1},
    {"include_num_input_tokens_seen": True},
    {"include_num_input_tokens_seen": False},
    {"include_num_input_tokens_seen": "non_padding"},
    {"bf16": True, "use_cpu": True},
    {"fp16": True, "use_cpu": True},
    {"use_cpu": True, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 4},
    {"torch_compile": True},
    {"torch_compile_mode": "reduce-overhead"},
    {"torch_compile_backend": "eager"},
    {"debug": "underflow_overflow"},
    {"report_to": "none"},
    {"report_to": ["none"]},
    {"report_to": []},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    {"disable_tqdm": True},
    {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
    {"accelerator_config": {"split_batches": True}},
    {"save_steps": 10.0, "logging_steps": 5.0},
    {"log_level": "debug", "log_level_replica": "error"},
    {"hub_token": "secret", "hub_model_id": "me/it", "hub_strategy": "end", "run_name": "one"},
]
DERIVED = (
    *("train_batch_size", "eval_batch_size", "world_size", "process_index", "local_process_index", "n_gpu", "parallel_mode"),
    *("should_log", "should_save", "place_model_on_device", "ddp_timeout_delta", "mixed_precision", "device"),
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_object_shows_what_transformers_shows(settings):
    transformers = pytest.importorskip("transformers")
    ours, theirs = TrainingArguments(**settings), transformers.TrainingArguments(**settings)
    skipped = {*DIFFERENT_FROM_TRANSFORMERS, "accelerator_config"}  # theirs loses use_configured_state on the way
    for field in dataclasses.fields(theirs):
        if field.name not in skipped:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    for name in DERIVED:
        assert getattr(ours, name) == getattr(getattr(theirs, name), "value", getattr(theirs, name)), name
    assert ours.get_process_log_level() == theirs.get_process_log_level()
    assert [ours.get_warmup_steps(n) for n in (1, 7, 100)] == [theirs.get_warmup_steps(n) for n in (1, 7, 100)]
    kept = theirs.to_dict()
    mine = ours.to_dict()
    assert {key: mine[key] for key in kept if key not in skipped} == {key: kept[key] for key in kept if key not in skipped}
    for key, value in kept["accelerator_config"].items():
        assert mine["accelerator_config"][key] == value
    mine, kept = ours.to_sanitized_dict(), theirs.to_sanitized_dict()
    assert {key: mine[key] for key in kept if key not in skipped} == {key: kept[key] for key in kept if key not in skipped}


def test_a_path_may_be_an_object():
    assert TrainingArguments(Path("runs") / "a").output_dir == os.path.join("runs", "a")
