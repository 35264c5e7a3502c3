"""The arguments as a script meets them; tests/trainer/arguments/ has the details."""

import dataclasses

import pytest

import fts
from fts.errors import ArgumentError
from fts.trainer import IntervalStrategy, TrainingArguments


def test_defaults_are_hugging_faces():
    args = TrainingArguments()
    assert args.output_dir == "trainer_output"
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (5e-5, 8, 3.0)
    assert TrainingArguments.learning_rate == 5e-5  # defaults are class attributes
    assert args.eval_strategy == "no"
    assert args.eval_strategy is IntervalStrategy.NO
    assert fts.TrainingArguments is TrainingArguments


def test_a_mistake_says_what_to_do():
    with pytest.raises(ArgumentError, match=r"no argument 'learning_rat'. Did you mean 'learning_rate'"):
        TrainingArguments("out", learning_rat=1)
    with pytest.raises(ArgumentError, match="save_steps=0"):
        TrainingArguments("out", save_steps=0)


def test_the_largest_seed_trains(tmp_path):
    from tests.trainer.helpers import make_trainer

    assert make_trainer(tmp_path, seed=2**63 - 1).train().global_step == 18


def test_arguments_fill_each_other_in():
    args = TrainingArguments(eval_strategy="steps", logging_steps=10, load_best_model_at_end=True)
    assert (args.eval_steps, args.metric_for_best_model, args.greater_is_better, args.do_eval) == (10, "loss", False, True)
    assert TrainingArguments(metric_for_best_model="accuracy").greater_is_better is True


def test_a_script_with_its_own_arguments():
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        temperature: float = 1.0

    parser = pytest.importorskip("transformers").HfArgumentParser(Mine)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "here", "--eval_strategy", "epoch", "--temperature", "0.5"])
    assert (args.output_dir, args.eval_strategy, args.temperature) == ("here", "epoch", 0.5)
