"""Subclasses, as scripts write them, are checked as the class itself is."""

import copy
import dataclasses
import pickle
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments


@dataclass
class Mine(TrainingArguments):
    temperature: float = 1.0
    layers: list[int] = field(default_factory=list)
    learning_rate: float = 1e-3
    api_token: str | None = None


@dataclass
class Forgets(TrainingArguments):
    extra: int = 3

    def __post_init__(self):
        self.extra += 1


@dataclass
class Remembers(Forgets):
    def __post_init__(self):
        self.logging_steps = 7
        super().__post_init__()
        TrainingArguments.__post_init__(self)
        self.more = self.eval_steps


@dataclass
class Clashes(TrainingArguments):
    def __post_init__(self):
        super().__post_init__()
        self.fp16 = self.bf16 = True


class Own(TrainingArguments):
    def __init__(self, size, **kwargs):
        super().__init__("out", **kwargs)
        self.size = size

    @property
    def place_model_on_device(self):
        return False


def test_fields_defaults_and_equality():
    args = Mine(temperature=2.0)
    assert (args.temperature, args.learning_rate, Mine.learning_rate, args.layers) == (2.0, 1e-3, 1e-3, [])
    assert args != Mine()
    assert args == Mine(temperature=2.0)
    assert args.to_dict()["temperature"] == 2.0


def test_names_are_checked():
    with pytest.raises(ArgumentError, match=r"Mine has no argument 'temprature'. Did you mean 'temperature'"):
        Mine(temprature=2.0)
    with pytest.raises(ArgumentError, match=r"Mine has no argument 'temperatur'. Did you mean 'temperature'"):
        Mine().temperatur = 2.0
    with pytest.raises(ArgumentError, match="Did you mean 'learning_rate'"):
        Mine(learning_rat=2.0)


@pytest.mark.parametrize("cls", [Forgets, Remembers])
def test_values_are_checked_also_without_the_super_call(cls):
    args = cls(eval_strategy="steps", logging_steps=7)
    assert (args.extra, args.eval_steps, args.do_eval, args.output_dir, args.report_to) == (4, 7, True, "trainer_output", [])
    with pytest.raises(ArgumentError, match="eval_strategy='epoch' and save_strategy='steps'"):
        cls(load_best_model_at_end=True, eval_strategy="epoch")
    with pytest.raises(ArgumentError, match="seed=-1"):
        cls(seed=-1)
    with pytest.raises(ArgumentError, match="Did you mean 'seed'"):
        cls(sed=1)
    with pytest.raises(ArgumentError, match="seed=-1"):
        cls().seed = -1


def test_a_conflict_from_the_subclass_is_found():
    with pytest.raises(ArgumentError, match="fp16=True and bf16=True"):
        Clashes()


def test_a_dictionary_of_its_own_may_be_json():
    @dataclass
    class Tuning(TrainingArguments):
        _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]
        model_init_kwargs: dict | str | None = None

    args = Tuning(model_init_kwargs='{"layers": "3"}')
    assert args.model_init_kwargs == {"layers": 3}
    args.model_init_kwargs = '{"layers": 4}'
    assert args.model_init_kwargs == {"layers": 4}


def test_a_constructor_of_its_own():
    args = Own(3, seed=5)
    assert (args.size, args.seed, args.output_dir, args.place_model_on_device) == (3, 5, "out", False)
    with pytest.raises(ArgumentError, match=r"Own has no argument 'learning_rat'. Did you mean 'learning_rate'"):
        Own(3, learning_rat=1)


def test_secrets_stay_secret():
    args = Mine(api_token="sesame", hub_token="sesame")
    for text in (str(args), repr(args), args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())):
        assert "sesame" not in text.replace("api_token='sesame'", "")  # a generated repr shows the subclass's own fields
    assert "sesame" not in str(args)
    assert args.hub_token == "sesame"


def test_copies():
    for args in (Mine(layers=[1]), Forgets()):
        assert copy.deepcopy(args) == args
        assert pickle.loads(pickle.dumps(args)) == args  # noqa: S301
    assert dataclasses.replace(Mine(layers=[1]), temperature=3.0).layers == [1]
