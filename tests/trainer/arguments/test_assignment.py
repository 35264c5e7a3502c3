"""A value is checked in the constructor and at each assignment; derived values are updated."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from fts.errors import ArgumentError
from fts.trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments, check_conflicts
from fts.trainer.arguments.enums import IntervalStrategy

BAD = [
    ("eval_strategy", "sometimes", "eval_strategy='sometimes' is unknown. Use one of 'no', 'steps', 'epoch'"),
    ("lr_scheduler_type", "zigzag", "lr_scheduler_type='zigzag' is unknown"),
    ("lr_scheduler_type", "cosin", "Did you mean 'cosine'"),
    ("optim", "adamm", "optim='adamm' is unknown"),
    ("hub_strategy", "never", "hub_strategy='never' is unknown. Use one of 'end'"),
    ("per_device_train_batch_size", 0, "per_device_train_batch_size=0 must be a whole number of at least 1"),
    ("per_device_eval_batch_size", 2.0, "per_device_eval_batch_size=2.0 must be a whole number"),
    ("gradient_accumulation_steps", 1.5, "gradient_accumulation_steps=1.5 must be a whole number"),
    ("max_steps", -5, "max_steps=-5 .* Use -1"),
    ("max_steps", True, "max_steps=True must be a whole number"),
    ("learning_rate", "1e-4", "learning_rate='1e-4' must be a number .* convert it"),
    ("learning_rate", float("nan"), "learning_rate=nan"),
    ("weight_decay", -0.1, "weight_decay=-0.1 must be a number of at least 0"),
    ("adam_beta1", 1.0, "adam_beta1=1.0 must be a number of at least 0 and below 1"),
    ("adam_beta2", -1, "adam_beta2=-1"),
    ("adam_epsilon", None, "adam_epsilon=None must be a number"),
    ("max_grad_norm", float("inf"), "max_grad_norm=inf must be a number"),
    ("num_train_epochs", 0, "num_train_epochs=0 must be a number above 0"),
    ("warmup_steps", -1, "warmup_steps=-1 must be a number of at least 0"),
    ("warmup_steps", 1.5, "warmup_steps=1.5 must be a whole number of steps, or a share"),
    ("logging_steps", 2.5, "logging_steps=2.5 must be a whole number of steps, or a share"),
    ("save_steps", -3, "save_steps=-3 must be a number"),
    ("eval_steps", "10", "eval_steps='10' must be a number"),
    ("save_total_limit", 0, "save_total_limit=0 .* save_strategy='no'"),
    ("eval_accumulation_steps", 0, "eval_accumulation_steps=0 .* Use None"),
    ("eval_delay", -1, "eval_delay=-1 must be a number"),
    ("torch_empty_cache_steps", 0.5, "torch_empty_cache_steps=0.5 must be a whole number .* Use None"),
    ("label_names", "labels", r"label_names='labels' must be a list of names, such as label_names=\['labels'\]"),
    ("label_names", [3], r"label_names=\[3\] must be a list of names"),
    ("include_for_metrics", ["input"], "include_for_metrics='input' is unknown. .* Did you mean 'inputs'"),
    ("include_for_metrics", "inputs", "include_for_metrics='inputs' must be a list"),
    ("label_smoothing_factor", 1.0, "label_smoothing_factor=1.0 must be a number of at least 0 and below 1"),
    ("neftune_noise_alpha", -1, "neftune_noise_alpha=-1 must be a number"),
    ("metric_for_best_model", "", "metric_for_best_model='' must be the name of an evaluation metric"),
    ("disable_tqdm", "no", "disable_tqdm='no' must be True, False or None"),
    ("tf32", 1, "tf32=1 must be True, False or None"),
    ("seed", -1, "seed=-1 must be a whole number of at least 0"),
    ("seed", 2**63, "seed=9223372036854775808 must be a whole number of at least 0 and below"),
    ("data_seed", 2**64, "data_seed=18446744073709551616 must be"),
    ("log_level", "warn", "log_level='warn' is unknown. .* Did you mean 'warning'"),
    ("include_num_input_tokens_seen", "some", "include_num_input_tokens_seen='some' is unknown. Use one of 'all'"),
    ("lr_scheduler_kwargs", "num_cycles=2", "lr_scheduler_kwargs='num_cycles=2' must be a dict, or JSON text"),
    ("lr_scheduler_kwargs", "{num_cycles: 2}", "is not JSON"),
    ("gradient_checkpointing_kwargs", 3, "gradient_checkpointing_kwargs=3 must be a dict"),
    ("optim_args", "rank", "optim_args='rank' must be pairs like"),
    ("optim_args", {"betas": [1, 2]}, "optim_args=.* must contain only numbers, booleans and words"),
    ("optim_args", 3, "optim_args=3 must be a string"),
    ("report_to", "tensorbord", "report_to='tensorbord' is unknown. .* Did you mean 'tensorboard'"),
    ("report_to", 3, "report_to=3 must be a name or a list"),
    ("save_safetensors", False, "save_safetensors=False: fts writes safetensors only"),
    ("dataloader_num_workers", -1, "dataloader_num_workers=-1 must be a whole number"),
    ("dataloader_prefetch_factor", 0, "dataloader_prefetch_factor=0 must be"),
    ("dataloader_multiprocessing_context", "thread", "dataloader_multiprocessing_context='thread' is unknown"),
    ("train_sampling_strategy", "sorted", "train_sampling_strategy='sorted' is unknown"),
    ("ddp_backend", "nccll", "ddp_backend='nccll' is unknown. .* Did you mean 'nccl'"),
    ("ddp_timeout", 0, "ddp_timeout=0 .* seconds"),
    ("ddp_bucket_cap_mb", 0, "ddp_bucket_cap_mb=0 must be"),
    ("debug", "overflow", "debug='overflow' is unknown"),
    ("debug", 3, "debug=3 must be a string"),
    ("output_dir", 3, "output_dir=3 must be the path of a directory"),
    ("run_name", 3, "run_name=3 must be a string"),
    ("hub_token", "", "hub_token='' must be a string"),
    ("generation_max_length", 0, "generation_max_length=0 must be"),
    ("generation_num_beams", -1, "generation_num_beams=-1 must be"),
    ("generation_config", 3, "generation_config=3 must be a GenerationConfig"),
    ("resume_from_checkpoint", 3, "resume_from_checkpoint=3 must be the path"),
]
FLAGS = [field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if isinstance(field.default, bool)]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_an_invalid_value_is_rejected_by_the_constructor_and_by_an_assignment(name, value, message):
    with pytest.raises(ArgumentError, match=message):
        Seq2SeqTrainingArguments(**{name: value})
    args = Seq2SeqTrainingArguments()
    before = copy.deepcopy(vars(args))
    with pytest.raises(ArgumentError, match=message):
        setattr(args, name, value)
    assert vars(args) == before


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_checked(name):
    with pytest.raises(ArgumentError, match=f"{name}='true' must be True or False.*without quotes"):
        Seq2SeqTrainingArguments(**{name: "true"})
    args = Seq2SeqTrainingArguments()
    with pytest.raises(ArgumentError, match=f"{name}=1 must be True or False"):
        setattr(args, name, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rat", "no argument 'learning_rat'. Did you mean 'learning_rate'"),
        ("evaluation_strategy", "Did you mean 'eval_strategy'"),
        ("warmup_ratio", "Did you mean 'warmup_steps'.* share of all steps"),
        ("lr", "Did you mean 'learning_rate'"),
        ("batch_size", "Did you mean 'per_device_train_batch_size'.*per_device_eval_batch_size"),
        ("logging_dir", "no argument 'logging_dir'. It is gone"),
        ("overwrite_output_dir", "no argument 'overwrite_output_dir'. It is gone"),
        ("push_to_hub_token", "Did you mean 'hub_token'"),
        ("no_cuda", "Did you mean 'use_cpu'"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(name, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingArguments(**{name: 1})
    args = TrainingArguments()
    with pytest.raises(ArgumentError, match=message):
        setattr(args, name, 1)
    assert not hasattr(args, name)


def test_a_name_without_a_similar_one_is_rejected_by_the_constructor():
    with pytest.raises(ArgumentError, match="no argument 'xyzzy', nor one with a similar name"):
        TrainingArguments(xyzzy=1)


def test_scripts_may_attach_values_to_the_arguments():
    args = TrainingArguments()
    args.use_im_start_end = True  # as some training scripts do
    args._n_gpu = 2
    args.deepspeed_plugin = args.distributed_state = args.hf_deepspeed_config = "theirs"
    assert (args.use_im_start_end, args.n_gpu, args.train_batch_size, args.parallel_mode) == (True, 2, 16, "not_distributed")
    assert "use_im_start_end" not in args.to_dict()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train_batch_size", "follows from other arguments and cannot be set. Set per_device_train_batch_size"),
        ("device", "Set use_cpu"),
        ("world_size", "Override the property"),
    ],
)
def test_derived_properties_cannot_be_set(name, message):
    with pytest.raises(ArgumentError, match=message):
        setattr(TrainingArguments(), name, 1)


def test_numbers_of_other_libraries_become_python_numbers():
    args = TrainingArguments(seed=np.int64(3), per_device_train_batch_size=np.int32(4), learning_rate=np.float32(0.5))
    assert type(args.seed) is type(args.per_device_train_batch_size) is int
    assert args.learning_rate == 0.5
    assert TrainingArguments(logging_steps=20.0).logging_steps == 20


def test_members_of_transformers_enums_are_taken():
    theirs = pytest.importorskip("transformers.trainer_utils")
    args = TrainingArguments(eval_strategy=theirs.IntervalStrategy.EPOCH)
    assert args.eval_strategy is IntervalStrategy.EPOCH
    args.save_strategy = theirs.SaveStrategy.NO
    assert args.save_strategy == "no"


def test_derived_values_are_updated():
    args = TrainingArguments()
    args.eval_strategy = "steps"
    assert (args.do_eval, args.eval_steps) == (True, 500)
    args.logging_steps = 10
    assert args.eval_steps == 10
    args.eval_steps = 20
    args.logging_steps = 5
    assert args.eval_steps == 20
    args.load_best_model_at_end = True
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)
    args.metric_for_best_model = "accuracy"
    assert args.greater_is_better is True
    args.greater_is_better = False
    args.metric_for_best_model = "f1"
    assert args.greater_is_better is False
    args.eval_strategy = "no"
    assert args.do_eval is False


def test_compiling_follows_its_settings_until_it_is_turned_off():
    args = TrainingArguments()
    args.torch_compile_mode = "reduce-overhead"
    assert (args.torch_compile, args.torch_compile_backend) == (True, "inductor")
    args.torch_compile = False
    args.seed = 3
    assert (args.torch_compile, args.torch_compile_backend) == (False, None)
    off = TrainingArguments(use_cpu=True)
    assert off.dataloader_pin_memory is False
    off.use_cpu = False
    assert off.dataloader_pin_memory is True


@pytest.mark.parametrize("one", ["activation_checkpointing", "gradient_checkpointing"])
def test_both_names_of_checkpointing_show_the_same(one):
    args = TrainingArguments(**{one: True, f"{one}_kwargs": {"use_reentrant": False}})
    other = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name != one)
    assert getattr(args, other) is True
    assert getattr(args, f"{other}_kwargs") == {"use_reentrant": False}
    setattr(args, one, False)
    assert getattr(args, other) is False
    setattr(args, other, True)
    assert getattr(args, one) is True
    with pytest.raises(ArgumentError, match="two names of one argument"):
        dataclasses.replace(args, **{one: False})
    assert getattr(dataclasses.replace(args, **{one: False, other: False}), one) is False


def test_two_arguments_can_be_changed_one_after_the_other():
    args = TrainingArguments(eval_strategy="steps", eval_steps=100, save_steps=200, load_best_model_at_end=True)
    args.eval_strategy = "epoch"
    with pytest.raises(ArgumentError, match="eval_strategy='epoch' and save_strategy='steps'"):
        check_conflicts(args)
    args.save_strategy = "epoch"
    check_conflicts(args)


def test_arguments_can_be_copied_pickled_and_replaced():
    args = TrainingArguments(seed=7, lr_scheduler_type="cosine", eval_strategy="steps", logging_steps=3, hub_token="s")
    for other in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), copy.copy(args)):  # noqa: S301
        assert other == args
        assert vars(other) == vars(args)
        with pytest.raises(ArgumentError):
            other.seed = -1
    other.logging_steps = 9
    assert dataclasses.replace(args, seed=8).seed == 8
    assert dataclasses.replace(args) == args
    assert TrainingArguments(**args.to_dict()) == dataclasses.replace(args, hub_token=None)


def test_a_copy_is_independent():
    args = TrainingArguments()
    other = copy.copy(args)
    other.eval_strategy = "steps"
    assert args.eval_strategy == "no"
    args.eval_strategy = "steps"
    args.logging_steps = 7
    other.eval_steps = 3
    args.logging_steps = 8
    assert (args.eval_steps, other.eval_steps) == (8, 3)


def test_the_post_init_can_be_run_again():
    args = TrainingArguments()
    args.__post_init__()
    assert args == TrainingArguments()
