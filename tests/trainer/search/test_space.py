import numpy as np
import pytest

from fts.errors import ArgumentError
from fts.trainer import TrainingArguments, default_hp_space_optuna, default_hp_space_ray
from fts.trainer.search.trial_arguments import with_trial_values


class RecordingTrial:
    """A trial that records its calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs)) or len(self.calls)


def test_optunas_space_is_that_of_transformers():
    theirs = pytest.importorskip("transformers.trainer_utils").default_hp_space_optuna
    one, other = RecordingTrial(), RecordingTrial()
    assert theirs(one) == default_hp_space_optuna(other)
    assert one.calls == other.calls and len(one.calls) == 4


def test_rays_space_is_that_of_transformers():
    pytest.importorskip("ray.tune")
    theirs = pytest.importorskip("transformers.trainer_utils").default_hp_space_ray(None)
    ours = default_hp_space_ray()
    shown = [
        {name: (type(value), value.domain_str, str(value.sampler)) for name, value in part.items()} for part in (theirs, ours)
    ]
    assert shown[0] == shown[1] and len(ours) == 4
    arguments = with_trial_values(TrainingArguments(), {name: value.sample() for name, value in ours.items()}, for_model=False)
    assert 1 <= arguments.seed <= 40 and isinstance(arguments.seed, int)


def test_values_are_converted_to_the_type_of_the_argument():
    values = {"seed": 3.9, "per_device_train_batch_size": np.int64(4), "learning_rate": np.float64(0.1), "data_seed": 2.5}
    args = with_trial_values(TrainingArguments(), values, for_model=False)
    found = [getattr(args, name) for name in values]
    assert found == [3, 4, 0.1, 2] and [type(value) for value in found] == [int, int, float, int]


def test_the_original_arguments_stay_and_derived_ones_are_updated():
    args = TrainingArguments(eval_strategy="steps", logging_steps=10)
    changed = with_trial_values(args, {"logging_steps": 20, "optim": "sgd"}, for_model=False)
    assert (args.logging_steps, args.eval_steps, str(args.optim)) == (10, 10, "adamw_torch")
    assert (changed.logging_steps, changed.eval_steps, str(changed.optim)) == (20, 20, "sgd")


@pytest.mark.parametrize(
    ("values", "for_model", "text"),
    [
        ({"learning_rat": 1.0}, True, "Did you mean 'learning_rate'"),
        ({"lr": 1.0}, True, "Did you mean 'learning_rate'"),
        ({"layers": 2}, False, "no argument 'layers'.* let model_init take the trial"),
        ({"tf32": True}, True, "cannot choose 'tf32'. It applies to the process"),
        ({"output_dir": "x"}, True, "cannot choose 'output_dir'"),
        ({"learning_rate": -1.0}, False, "learning_rate=-1.0"),
        ({"optim": "adamx"}, False, "optim='adamx'"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, False, "load_best_model_at_end"),
        ({"train_batch_size": 2}, True, "per_device_train_batch_size"),
    ],
)
def test_wrong_values(values, for_model, text):
    with pytest.raises(ArgumentError, match=text):
        with_trial_values(TrainingArguments(), values, for_model=for_model)


def test_names_unlike_any_argument_are_for_model_init():
    assert with_trial_values(TrainingArguments(), {"layers": 2, "seed": 5}, for_model=True).seed == 5


def test_an_integer_stays_an_integer_after_command_line_parsing():
    transformers = pytest.importorskip("transformers")
    transformers.HfArgumentParser(TrainingArguments)  # replaces the types of the fields
    assert with_trial_values(TrainingArguments(), {"seed": 3.7, "max_steps": 9.2}, for_model=False).max_steps == 9
