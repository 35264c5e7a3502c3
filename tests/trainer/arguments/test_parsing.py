"""Command lines, JSON and dictionaries through transformers' HfArgumentParser."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from fts.trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments

HfArgumentParser = pytest.importorskip("transformers").HfArgumentParser


@dataclass
class Mine(TrainingArguments):
    temperature: float = 1.0


def parse(cls, line):
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(line.split(), look_for_args_file=False)
    return args


@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments, Mine])
def test_an_empty_line_gives_the_defaults(cls):
    assert parse(cls, "") == cls()


def test_a_long_line():
    line = (
        "--output_dir here --eval_strategy epoch --bf16 --use_cpu --learning_rate 3e-4 --max_steps 7 --no_dataloader_pin_memory "
        "--gradient_checkpointing --label_names a b --report_to none --include_for_metrics inputs loss --temperature 2 "
        "--greater_is_better False --metric_for_best_model f1 --warmup_steps 0.1 --hub_token s --dataloader_num_workers 2 "
        "--include_num_input_tokens_seen all --debug underflow_overflow --save_strategy no --dataloader_prefetch_factor 3"
    )
    args = parse(Mine, line)
    expected = Mine(
        output_dir="here",
        eval_strategy="epoch",
        bf16=True,
        use_cpu=True,
        learning_rate=3e-4,
        max_steps=7,
        dataloader_pin_memory=False,
        gradient_checkpointing=True,
        label_names=["a", "b"],
        include_for_metrics=["inputs", "loss"],
        temperature=2.0,
        greater_is_better=False,
        metric_for_best_model="f1",
        warmup_steps=0.1,
        hub_token="s",
        dataloader_num_workers=2,
        include_num_input_tokens_seen="all",
        debug="underflow_overflow",
        save_strategy="no",
        dataloader_prefetch_factor=3,
    )
    assert args == expected


@pytest.mark.parametrize("name", ["lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_dictionaries_come_as_json(name):
    args = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        [f"--{name}", '{"a": "1", "b": true, "c": {"d": "no"}}']
    )[0]
    assert getattr(args, name) == {"a": 1, "b": True, "c": {"d": "no"}}


def test_an_accelerator_config_comes_as_json_or_as_a_path(tmp_path):
    assert parse(TrainingArguments, '--accelerator_config {"even_batches":false}').accelerator_config.even_batches is False
    path = tmp_path / "config.json"
    path.write_text('{"split_batches": true}')
    assert parse(TrainingArguments, f"--accelerator_config {path}").accelerator_config.split_batches is True


@pytest.mark.parametrize("text", ["momentum=0.9,nesterov=True", '{"momentum":0.9,"nesterov":true}'])
def test_optimizer_settings_come_as_pairs_or_as_json(text):
    assert parse(TrainingArguments, f"--optim_args {text}").optim_args == "momentum=0.9,nesterov=True"
    assert TrainingArguments(optim_args={"momentum": 0.9, "nesterov": True}).optim_args == "momentum=0.9,nesterov=True"


@pytest.mark.parametrize(
    ("line", "value"),
    [("", "all"), ("non_padding", "non_padding"), ("no", "no"), ("True", "all"), ("False", "no")],
)
def test_tokens_to_count(line, value):
    assert parse(TrainingArguments, f"--include_num_input_tokens_seen {line}").include_num_input_tokens_seen == value


@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments, Mine])
def test_json_round_trip(cls, tmp_path):
    args = cls(
        "here", eval_strategy="steps", logging_steps=0.1, lr_scheduler_kwargs={"num_cycles": 2}, debug="underflow_overflow"
    )
    path = tmp_path / "args.json"
    path.write_text(args.to_json_string())
    assert HfArgumentParser(cls).parse_json_file(str(path))[0] == args
    assert HfArgumentParser(cls).parse_dict(json.loads(args.to_json_string()))[0] == args
    assert HfArgumentParser(cls).parse_dict(args.to_dict())[0] == args


def test_the_help_prints_every_argument():
    text = HfArgumentParser(Seq2SeqTrainingArguments).format_help()
    assert all(f"--{field.name}" in text for field in dataclasses.fields(Seq2SeqTrainingArguments))


def test_a_generation_config_becomes_a_dictionary():
    from transformers import GenerationConfig

    args = Seq2SeqTrainingArguments(generation_config=GenerationConfig(max_new_tokens=5))
    assert args.to_dict()["generation_config"]["max_new_tokens"] == 5
    assert json.loads(args.to_json_string())["generation_config"]["max_new_tokens"] == 5
    assert Seq2SeqTrainingArguments(generation_config="some/model").generation_config == "some/model"
