"""Arguments that contradict each other are errors at construction, and can be checked again."""

import copy

import pytest

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments, check_conflicts, sampling_strategy

ASKED = [
    ({"fp16": True, "bf16": True}, "fp16=True and bf16=True: at most one"),
    ({"fp16_full_eval": True, "bf16_full_eval": True}, "fp16_full_eval=True and bf16_full_eval=True"),
    ({"save_strategy": "best", "eval_strategy": "epoch"}, "`args.metric_for_best_model` must be provided"),
    ({"save_strategy": "best", "metric_for_best_model": "loss"}, "needs evaluations"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau' needs evaluations"),
    ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type='greedy' needs evaluations"),
    ({"load_best_model_at_end": True}, "eval_strategy='no' and save_strategy='steps'"),
    ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "eval_strategy='epoch' and save_strategy='steps'"),
    (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 200, "save_steps": 300},
        "save_steps to be a multiple of eval_steps",
    ),
    (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 300},
        "save_steps=300 and eval_steps=0.1 are not",
    ),
    ({"save_steps": 0}, "save_steps=0 with save_strategy='steps'"),
    ({"logging_steps": 0}, "logging_steps=0 with logging_strategy='steps'"),
    ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps=0 with eval_strategy='steps'"),
    ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor=2 needs worker processes, but dataloader_num_workers=0"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True needs worker processes"),
    ({"dataloader_multiprocessing_context": "spawn"}, "dataloader_multiprocessing_context='spawn' needs worker processes"),
    ({"group_by_length": True, "train_sampling_strategy": "sequential"}, "ask for two orders of the data"),
    ({"optim_target_modules": ["q"]}, r"optim_target_modules=\['q'\] is for the galore and apollo optimizers"),
]


@pytest.mark.parametrize(("settings", "message"), ASKED, ids=str)
def test_a_conflict_is_found_at_construction_and_on_request(settings, message):
    with pytest.raises(ArgumentError, match=message):
        TrainingArguments(**settings)
    args = TrainingArguments()
    for name, value in settings.items():
        setattr(args, name, value)
    before = copy.deepcopy(vars(args))
    with pytest.raises(ArgumentError, match=message):
        check_conflicts(args)
    assert vars(args) == before


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_steps": 0, "save_strategy": "no"},
        {"logging_steps": 0, "logging_strategy": "epoch"},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 0.3},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 7, "save_strategy": "best"},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"bf16": True, "bf16_full_eval": True},
    ],
    ids=str,
)
def test_compatible_arguments_are_accepted(settings):
    check_conflicts(TrainingArguments(**settings))


def test_the_order_of_the_examples():
    assert sampling_strategy(TrainingArguments()) == "random"
    assert sampling_strategy(TrainingArguments(train_sampling_strategy="sequential")) == "sequential"
    assert sampling_strategy(TrainingArguments(group_by_length=True)) == "group_by_length"
