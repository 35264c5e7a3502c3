"""DeepSpeed's configuration: where it comes from, what the arguments fill in, and what contradicts them."""

import json

import pytest

from fts.distributed.strategies import DeepSpeed
from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.arguments.deepspeed_config import fill_deepspeed_config, finalize_deepspeed_config, load_deepspeed_config
from fts.trainer.arguments.strategy import resolve_strategy

LAUNCHED = {"RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
OF_LAUNCHER = {"ACCELERATE_USE_DEEPSPEED": "true"}
STAGE_2 = {"zero_optimization": {"stage": 2}}

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        **dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"),
    },
}


def arguments(**values):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    return TrainingArguments(
        **({"learning_rate": 0.1, "weight_decay": 0.2, "max_grad_norm": 0.5, "warmup_steps": 7} | sizes | values)
    )


def test_absent_and_auto_values_come_from_the_arguments():
    given = json.loads(json.dumps(AUTO))
    found = finalize_deepspeed_config(
        fill_deepspeed_config(given, arguments(), world_size=2), arguments(), total_steps=50, hidden_size=16
    )
    assert given == AUTO
    assert found == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.2}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.1, "warmup_num_steps": 7, "total_num_steps": 50},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 256,
            "stage3_prefetch_bucket_size": 230,
            "stage3_param_persistence_threshold": 160,
        },
    }
    bare = fill_deepspeed_config(STAGE_2, arguments(bf16=True), world_size=2)
    main = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3, "gradient_clipping": 0.5}
    assert bare == STAGE_2 | main | {"fp16": {"enabled": False}, "bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8}, r"train_batch_size=8, but per_device_train_batch_size \* .* \* processes=24"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8, but per_device_train_batch_size=4"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1, but gradient_accumulation_steps=3"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0, but max_grad_norm=0.5"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True, but bf16=False"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.params.lr=1.0, but learning_rate=0.1"),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.9]}}},
            r"optimizer.params.betas=\[0.9, 0.9\], but \[adam_beta1, adam_beta2\]=\[0.9, 0.999\]",
        ),
        ({"scheduler": {"params": {"warmup_max_lr": 1.0}}}, "scheduler.params.warmup_max_lr=1.0, but learning_rate=0.1"),
    ],
    ids=str,
)
def test_the_error_of_a_conflict_has_both_values(config, message):
    with pytest.raises(ArgumentError, match=f"contradicts the arguments: {message}.*'auto'"):
        fill_deepspeed_config(config, arguments(), world_size=2)


def test_values_that_depend_on_the_run_may_conflict_too():
    config = {"scheduler": {"params": {"total_num_steps": 9, "warmup_num_steps": 2}}}
    with pytest.raises(ArgumentError, match=r"total_num_steps=9, but the updates of the run=50; .*warmup_num_steps=2, but warm"):
        finalize_deepspeed_config(config, arguments(), total_steps=50, hidden_size=None)
    config = {"scheduler": {"params": {"warmup_num_steps": "auto"}}}
    assert finalize_deepspeed_config(config, arguments(warmup_steps=0), total_steps=50, hidden_size=None)["scheduler"][
        "params"
    ] == {"warmup_num_steps": 1}


def test_an_unknown_auto_value_is_an_error():
    with pytest.raises(ArgumentError, match=r"zero_optimization.reduce_bucket_size, .* = 'auto', .* hidden_size"):
        finalize_deepspeed_config({"zero_optimization": AUTO["zero_optimization"]}, arguments(), total_steps=5, hidden_size=None)


def test_the_batch_size_of_the_search_takes_precedence():
    config = {"train_batch_size": 100, "train_micro_batch_size_per_gpu": 50}
    found = fill_deepspeed_config(config, arguments(), world_size=2, batch_size=2, auto_find_batch_size=True)
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (12, 2)


def test_nodes_with_local_disks():
    assert fill_deepspeed_config(STAGE_2, arguments(save_on_each_node=True), world_size=2)["checkpoint"] == {
        "use_node_local_storage": True
    }


# Where it comes from


def test_a_dictionary_text_or_file(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(STAGE_2))
    for given in (STAGE_2, json.dumps(STAGE_2), str(path)):
        args = TrainingArguments(deepspeed=given)
        assert load_deepspeed_config(args.deepspeed, {}) == STAGE_2
    assert load_deepspeed_config(None, {}) is None
    assert load_deepspeed_config(None, OF_LAUNCHED_FILE | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}) == STAGE_2


OF_LAUNCHED_FILE = OF_LAUNCHER | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read"), ("{", "is not JSON"), ("[1]", "holds a list")])
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArgumentError, match=rf"^deepspeed='.*ds.json' {message}"):
        TrainingArguments(deepspeed=str(path))


def test_the_launcher_sets_it_by_environment_variables():
    said = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/disk",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    }
    config = load_deepspeed_config(None, OF_LAUNCHER | said)
    assert config == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "nvme", "nvme_path": "/disk"},
        },
    }
    assert load_deepspeed_config(None, OF_LAUNCHER)["zero_optimization"] == {"stage": 2}


# The strategy


def test_it_is_a_strategy():
    found = resolve_strategy(arguments(deepspeed=AUTO), LAUNCHED, world_size=2)
    assert isinstance(found, DeepSpeed)
    assert (found.stage, found.name) == (3, "DeepSpeed, ZeRO stage 3")
    assert found.config["train_batch_size"] == 24
    assert resolve_strategy(arguments(gradient_accumulation_steps=1), LAUNCHED | OF_LAUNCHER, world_size=2).stage == 2
    assert resolve_strategy(arguments(deepspeed=STAGE_2), {"RANK": "0"}, world_size=1).stage == 2
    assert DeepSpeed({}).stage == 0


@pytest.mark.parametrize(
    ("environ", "values", "message"),
    [
        ({}, {"fsdp": True}, "Both DeepSpeed and FSDP"),
        ({}, {"parallelism_config": {"tp_size": 2}}, "2 processes are to work on the same examples"),
        ({}, {"max_grad_norm": 2.0, "deepspeed": {"gradient_clipping": 1.0}}, "contradicts"),
        ({}, {"deepspeed": {"zero_optimization": {"stage": 4}}}, "stage=4 must be 0, 1, 2 or 3"),
    ],
    ids=str,
)
def test_what_cannot_be(environ, values, message):
    with pytest.raises(ArgumentError, match=message):
        resolve_strategy(arguments(**({"deepspeed": STAGE_2} | values)), LAUNCHED | environ, world_size=2)


def test_it_needs_a_launcher():
    with pytest.raises(ArgumentError, match=r"^deepspeed= shards a model .* leave deepspeed out"):
        resolve_strategy(arguments(deepspeed=STAGE_2), {}, world_size=1)
