import dataclasses
import pickle

import pytest

from fts.errors import ArgumentError
from fts.trainer import IntervalStrategy, TrainingArguments
from fts.trainer.plan import decayed_names, make_plan, steps_of


def test_defaults_are_hugging_faces():
    args = TrainingArguments()
    assert args.output_dir == "trainer_output"
    assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (5e-5, 8, 3.0)
    assert TrainingArguments.learning_rate == 5e-5  # defaults are class attributes
    assert args.eval_strategy == "no"
    assert args.eval_strategy is IntervalStrategy.NO


def test_defaults_equal_those_of_transformers():
    theirs = pytest.importorskip("transformers").TrainingArguments
    defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
    skipped = {"optim"}  # ours is the documented one; both are the same kernel here
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in skipped:
            assert field.default == defaults[field.name], field.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "no argument 'learning_rat'. Did you mean 'learning_rate'"),
        ({"evaluation_strategy": "steps"}, "Did you mean 'eval_strategy'"),
        ({"warmup_ratio": 0.1}, "Did you mean 'warmup_steps'.* share of all steps"),
        ({"xyzzy": 1}, "no argument 'xyzzy'. It has: adam_beta1"),
        ({"eval_strategy": "sometimes"}, "eval_strategy='sometimes' is unknown. Use one of 'no', 'steps', 'epoch'"),
        ({"lr_scheduler_type": "zigzag"}, "lr_scheduler_type='zigzag' is unknown"),
        ({"optim": "adamm"}, "optim='adamm' is unknown"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be a whole number of at least 1"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps=1.5 must be a whole number"),
        ({"max_steps": -5}, "max_steps=-5 .* Use -1"),
        ({"learning_rate": "1e-4"}, "learning_rate='1e-4' must be a number .* convert it"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0 must be a number of at least 0 and below 1"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 must be a number above 0"),
        ({"logging_steps": 2.5}, "logging_steps=2.5 must be a whole number of steps, or a share"),
        ({"save_steps": 0}, "save_steps=0"),
        ({"save_total_limit": 0}, "save_total_limit=0 .* save_strategy='no'"),
        ({"label_names": "labels"}, r"label_names='labels' must be a list of names, such as label_names=\['labels'\]"),
        ({"report_to": "tensorboard"}, "report_to='tensorboard': trackers are not there yet"),
        ({"label_names": 3}, "label_names=3 must be a list of names"),
        ({"bf16": "yes"}, "bf16='yes' must be True or False"),
        ({"use_cpu": "False"}, "use_cpu='False' must be True or False.*without quotes"),
        ({"load_best_model_at_end": 1}, "load_best_model_at_end=1 must be True or False"),
        ({"disable_tqdm": "no"}, "disable_tqdm='no' must be True, False or None"),
        ({"greater_is_better": 0}, "greater_is_better=0 must be True, False or None"),
        ({"metric_for_best_model": 3}, "metric_for_best_model=3 must be the name of a figure"),
        ({"metric_for_best_model": ""}, "metric_for_best_model='' must be the name of a figure"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be a whole number of at least 0 and below"),
        ({"data_seed": 2**64}, "data_seed=18446744073709551616 must be"),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, "`args.metric_for_best_model` must be provided"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "needs evaluations"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "eval_strategy='epoch' and save_strategy='steps'"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 200, "save_steps": 300},
            "save_steps to be a multiple of eval_steps",
        ),
    ],
)
def test_a_bad_argument_is_an_error_that_says_what_to_do(changes, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingArguments("out", **changes)


def test_every_flag_is_checked():
    for field in dataclasses.fields(TrainingArguments):
        if isinstance(field.default, bool):
            with pytest.raises(ArgumentError, match=f"{field.name}='true' must be True or False"):
                TrainingArguments("out", **{field.name: "true"})


def test_the_largest_seed_trains(tmp_path):
    from tests.trainer.helpers import make_trainer

    assert make_trainer(tmp_path, seed=2**63 - 1).train().global_step == 18


def test_a_subclass_is_checked_too():
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        temperature: float = 1.0

    assert Mine(temperature=2.0).temperature == 2.0
    with pytest.raises(ArgumentError, match=r"Mine has no argument 'temprature'. Did you mean 'temperature'"):
        Mine(temprature=2.0)


def test_arguments_fill_each_other_in():
    args = TrainingArguments(eval_strategy="steps", logging_steps=10, load_best_model_at_end=True)
    assert (args.eval_steps, args.metric_for_best_model, args.greater_is_better, args.do_eval) == (10, "loss", False, True)
    assert TrainingArguments(metric_for_best_model="accuracy").greater_is_better is True


def test_arguments_can_be_copied_pickled_and_parsed():
    args = TrainingArguments(seed=7, lr_scheduler_type="cosine")
    assert pickle.loads(pickle.dumps(args)) == args  # noqa: S301
    assert dataclasses.replace(args, seed=8).seed == 8
    parser = pytest.importorskip("transformers").HfArgumentParser(TrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", "here", "--eval_strategy", "epoch", "--bf16"])
    assert (parsed.output_dir, parsed.eval_strategy, parsed.bf16) == ("here", "epoch", True)


@pytest.mark.parametrize(
    ("changes", "batches", "expected"),
    [
        ({}, 10, {"total_steps": 30, "epochs": 3, "steps_per_epoch": 10, "warmup_steps": 0, "precision": None}),
        ({"num_train_epochs": 1.25}, 10, {"total_steps": 13, "epochs": 2, "samples": 100.0}),
        ({"max_steps": 25}, 10, {"total_steps": 25, "epochs": 3, "samples": 200}),
        ({"max_steps": 25}, None, {"total_steps": 25, "epochs": 1, "steps_per_epoch": None}),
        ({"gradient_accumulation_steps": 4}, 10, {"total_steps": 9, "steps_per_epoch": 3, "accumulate": 4}),
        ({"gradient_accumulation_steps": 40}, 10, {"total_steps": 3, "steps_per_epoch": 1}),
        (
            {"warmup_steps": 0.1, "logging_steps": 0.05, "save_steps": 7},
            10,
            {"warmup_steps": 3, "logging_steps": 2, "save_steps": 7},
        ),
        ({"bf16": True, "torch_compile": True}, 10, {"precision": "bf16", "compiled": True}),
    ],
)
def test_plan(changes, batches, expected):
    plan = make_plan(TrainingArguments(**changes), batches=batches, items=80)
    assert {name: getattr(plan, name) for name in expected} == expected
    assert plan == make_plan(TrainingArguments(**changes), batches=batches, items=80)


def test_a_plan_without_an_end_is_an_error():
    with pytest.raises(ArgumentError, match="max_steps=-1 with training data that has no length"):
        make_plan(TrainingArguments(), batches=None, items=None)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial"])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (4, 10)])
def test_schedules_are_those_of_transformers(kind, total, warmup):
    transformers = pytest.importorskip("transformers")
    import torch

    args = TrainingArguments(learning_rate=0.5, lr_scheduler_type=kind, max_steps=total, warmup_steps=warmup)
    plan = make_plan(args, batches=10, items=80)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert float(plan.schedule(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_weight_decay_spares_what_transformers_spares():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    model = transformers.BertForSequenceClassification(config)
    theirs = transformers.Trainer(model).get_decay_parameter_names(model)
    assert decayed_names(model) == set(theirs)


def test_shares_of_all_steps():
    assert [steps_of(value, 30) for value in (0, 0.1, 0.33, 1, 5)] == [0, 3, 10, 1, 5]
