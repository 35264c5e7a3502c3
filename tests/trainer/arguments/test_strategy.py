"""Which strategy arguments and the launcher's environment ask for, and which contradictions are errors."""

import json
import logging

import pytest
import torch
from accelerate import ParallelismConfig

from fts.distributed.device_mesh import Mesh, data_parallel_rank_and_size
from fts.distributed.strategies import DDP, FSDP, SingleProcess
from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.arguments.enums import FSDPOption
from fts.trainer.arguments.strategy import resolve_mesh, resolve_strategy

LAUNCHED = {"RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}


def asked(environ=(), world=2, **arguments):
    return resolve_strategy(TrainingArguments(**arguments), LAUNCHED | dict(environ), world_size=world)


def refuses(message, environ=(), world=2, **arguments):
    with pytest.raises(ArgumentError, match=message):
        asked(environ, world, **arguments)


@pytest.mark.parametrize("value", [None, False, "", [], "false"], ids=repr)
def test_fsdp_is_off(value):
    assert not TrainingArguments(fsdp=value).fsdp
    assert isinstance(asked(fsdp=value), DDP)


@pytest.mark.parametrize(
    "value",
    [True, "true", "full_shard", "full_shard auto_wrap", ["full_shard", "auto_wrap"], [FSDPOption.FULL_SHARD], "auto_wrap"],
    ids=repr,
)
def test_fsdp_is_on(value):
    assert asked(fsdp=value) == FSDP()
    assert TrainingArguments(fsdp=value).fsdp
    json.loads(TrainingArguments(fsdp=value).to_json_string())


def test_what_is_sharded():
    assert asked(fsdp="shard_grad_op") == FSDP(reshard_after_forward=False)
    assert asked(fsdp="full_shard offload") == FSDP(cpu_offload=True)
    assert asked(fsdp="no_shard", ddp_bucket_cap_mb=7).bucket_cap_mb == 7  # nothing is sharded: DDP
    two_machines = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert asked(two_machines, 4, fsdp="hybrid_shard") == FSDP(replicate=2)
    assert asked(two_machines, 4, fsdp="hybrid_shard_zero2") == FSDP(replicate=2, reshard_after_forward=False)
    assert asked(fsdp="hybrid_shard") == FSDP()  # one machine


@pytest.mark.parametrize(
    ("settings", "attributes"),
    [
        ({"transformer_layer_cls_to_wrap": "BertLayer"}, {"units": ("BertLayer",)}),
        ({"fsdp_transformer_layer_cls_to_wrap": ["A", "B"]}, {"units": ("A", "B")}),
        ({"transformer_cls_names_to_wrap": "A,B"}, {"units": ("A", "B")}),
        ({"min_num_params": 2000}, {"units": 2000}),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": "2000"}, {"units": 2000}),
        ({"auto_wrap_policy": "NO_WRAP"}, {"units": None}),
        ({"auto_wrap_policy": "transformer_based_wrap"}, {"units": "auto"}),
        ({"reshard_after_forward": "false"}, {"reshard_after_forward": False}),
        ({"version": 1, "reshard_after_forward": "shard_grad_op"}, {"reshard_after_forward": False}),
        ({"sharding_strategy": 2}, {"reshard_after_forward": False}),
        ({"sharding_strategy": "FULL_SHARD"}, {}),
        ({"cpu_offload": True}, {"cpu_offload": True}),
        ({"offload_params": "true"}, {"cpu_offload": True}),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, {"state_dict_type": "sharded"}),
        ({"state_dict_type": "full_state_dict"}, {}),
        ({"activation_checkpointing": True}, {"activation_checkpointing": True}),
        (
            {"activation_checkpointing": True, "activation_checkpointing_offload": True},
            {"activation_checkpointing": True, "activation_checkpointing_offload": True},
        ),
        ({"cpu_ram_efficient_loading": True}, {}),
        ({"ignored_modules": r"head\..*"}, {"ignored_modules": (r"head\..*",)}),
        (
            {"mixed_precision_policy": {"param_dtype": "bfloat16", "reduce_dtype": "fp32", "cast_forward_inputs": False}},
            {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False},
        ),
        ({"mixed_precision_policy": "bf16"}, dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), torch.bfloat16)),
        (
            {"use_orig_params": True, "sync_module_states": True, "limit_all_gathers": True, "backward_prefetch": "backward_pre"},
            {},
        ),
        ({"xla": False, "xla_fsdp_settings": {}, "xla_fsdp_grad_ckpt": False, "min_num_params": 0, "version": 2}, {}),
    ],
    ids=str,
)
def test_each_setting_does_what_it_says(settings, attributes, tmp_path):
    assert asked(fsdp=True, fsdp_config=settings) == FSDP(**attributes)
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps(settings))
    assert asked(fsdp=True, fsdp_config=str(path)) == FSDP(**attributes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_num_parms": 1}, "Did you mean 'min_num_params'"),
        ({"min_num_params": -1}, "min_num_params=-1 must be a whole number of at least 0"),
        ({"min_num_params": 5, "transformer_layer_cls_to_wrap": "A"}, "both define the units"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "needs min_num_params"),
        ({"auto_wrap_policy": "NO_WRAP", "min_num_params": 5}, "'NO_WRAP' does not go with 5"),
        ({"auto_wrap_policy": "ALL"}, "auto_wrap_policy='ALL' is unknown"),
        (
            {"reshard_after_forward": False},
            "'full_shard' frees parameters after the forward pass, but reshard_after_forward=False",
        ),
        ({"sharding_strategy": "shard_grad_op"}, "'full_shard' and 'shard_grad_op' for fsdp. Give one of them"),
        (
            {"state_dict_type": "LOCAL_STATE_DICT"},
            "'LOCAL_STATE_DICT' is unknown. Use one of 'FULL_STATE_DICT', 'SHARDED_STATE_DICT'",
        ),
        ({"cpu_ram_efficient_loading": True, "sync_module_states": False}, "without weights"),
        ({"mixed_precision_policy": {"buffer_dtype": "bf16"}}, "FSDP2 leaves buffers as they are"),
        ({"mixed_precision_policy": {"param_dtype": "int8"}}, "param_dtype='int8' is unknown"),
        ({"activation_checkpointing_offload": True}, "but activation_checkpointing=False"),
        ({"xla": True}, "TPUs, which are not supported"),
        ({"version": 3}, "must be 1 or 2"),
        ({"use_orig_params": "maybe"}, "must be True or False"),
    ],
    ids=str,
)
def test_invalid_settings_are_errors(settings, message):
    refuses(message, fsdp="full_shard", fsdp_config=settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"version": 1}, "replaces version 1"),
        ({"use_orig_params": False}, "always keeps the original parameters"),
        ({"forward_prefetch": True}, "always prefetches the next unit's parameters"),
        ({"backward_prefetch": "backward_post"}, "which is 'backward_pre'"),
        ({"limit_all_gathers": "false"}, "always limits how much is all-gathered"),
        ({"sync_module_states": False}, "always starts with the weights of rank 0"),
    ],
    ids=str,
)
def test_differences_of_fsdp2_are_warned_of_once(settings, words, caplog):
    with caplog.at_level(logging.WARNING):
        args = TrainingArguments(fsdp=True, fsdp_config=settings)
        assert resolve_strategy(args, LAUNCHED, world_size=2) == FSDP()
    assert [words in record.getMessage() for record in caplog.records] == [True]


def test_settings_without_fsdp_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        TrainingArguments(fsdp_config={"min_num_params": 0, "xla": False})  # what transformers writes by itself
        assert not caplog.records
        assert isinstance(asked(fsdp_config={"min_num_params": 9}), DDP)
    assert "has no effect without fsdp=True" in caplog.text


def test_precision_is_that_of_the_arguments():
    low = FSDP(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    assert asked(fsdp=True, bf16=True) == low
    assert (
        asked(fsdp=True, bf16=True, fsdp_config={"mixed_precision_policy": {"reduce_dtype": "bf16"}}).reduce_dtype
        == torch.bfloat16
    )


def test_arguments_contradict_each_other():
    refuses(
        "gradient_checkpointing=True would compute",
        fsdp=True,
        fsdp_config={"activation_checkpointing": True},
        gradient_checkpointing=True,
    )
    refuses("'no_shard' does not shard parameters", fsdp="no_shard offload")
    refuses("'full_shard' and 'shard_grad_op'", fsdp="full_shard shard_grad_op")
    refuses("'fast' is unknown", fsdp="fast")
    with pytest.raises(ArgumentError, match="fsdp=True shards a model over processes, but the script was not started by"):
        resolve_strategy(TrainingArguments(fsdp=True), {}, world_size=1)
    assert resolve_strategy(TrainingArguments(fsdp=True), {"RANK": "0", "WORLD_SIZE": "1"}, world_size=1) == FSDP()


# accelerate launch

OF_LAUNCHER = {  # what `accelerate launch --use_fsdp` always sets
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


@pytest.mark.parametrize(
    ("said", "attributes"),
    [
        ({}, {}),
        ({"FSDP_VERSION": "2"}, {}),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, {"reshard_after_forward": False}),
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, {"reshard_after_forward": False}),
        ({"FSDP_SHARDING_STRATEGY": "2"}, {"reshard_after_forward": False}),
        ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "A,B"}, {"units": ("A", "B")}),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "2000"}, {"units": 2000}),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, {"units": None}),
        (
            {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            {"cpu_offload": True, "state_dict_type": "sharded"},
        ),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"activation_checkpointing": True}),
        ({"FSDP_IGNORED_MODULES": "head"}, {"ignored_modules": ("head",)}),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}, {}),
    ],
    ids=str,
)
def test_the_launcher_sets_what_the_arguments_do_not(said, attributes):
    assert asked(OF_LAUNCHER | said) == FSDP(**attributes)


def test_arguments_take_precedence_over_the_launcher():
    settings = {"transformer_layer_cls_to_wrap": "A", "cpu_ram_efficient_loading": False, "reshard_after_forward": False}
    launcher = OF_LAUNCHER | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_OFFLOAD_PARAMS": "true"}
    expected = FSDP(units=("A",), reshard_after_forward=False, cpu_offload=True)
    assert asked(launcher, fsdp=True, fsdp_config=settings) == expected
    assert asked(launcher, fsdp_config=settings) == expected


def test_what_a_launcher_turns_on_is_not_ignored(monkeypatch):
    variable = "ACCELERATE_USE_MEGATRON_LM"
    refuses(f"{variable} is set, but .* is not yet in this version of fts. Launch with FSDP", {variable: "true"})
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ArgumentError, match=variable):
        TrainingArguments()


# DDP, one process


def test_ddp_arguments():
    assert asked() == DDP(find_unused_parameters=True, broadcast_buffers=True)
    assert asked(gradient_checkpointing=True) == DDP(find_unused_parameters=False, broadcast_buffers=False)
    given = {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False, "ddp_bucket_cap_mb": 3}
    assert asked(**given) == DDP(False, 3, False)
    assert asked(ddp_static_graph=True) == DDP(static_graph=True)


def test_one_process():
    assert resolve_strategy(TrainingArguments(use_cpu=True), {}, world_size=1) == SingleProcess()


# The mesh


def mesh(world, environ=(), tensor=1, **arguments):
    return resolve_mesh(TrainingArguments(**arguments), LAUNCHED | dict(environ), world_size=world, tp_size=tensor)


def test_the_device_mesh():
    assert mesh(4) == Mesh(replicate=4)
    assert mesh(4, fsdp=True) == Mesh(shard=4)
    assert mesh(4, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, fsdp="hybrid_shard") == Mesh(replicate=2, shard=2)
    sizes = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2, tp_size=2)
    assert mesh(8, fsdp=True, parallelism_config=sizes) == Mesh(replicate=2, shard=2, tensor=2)
    assert mesh(8, fsdp=True, parallelism_config={"tp_size": 2}) == Mesh(shard=4, tensor=2)
    assert mesh(8, fsdp=True, parallelism_config={"dp_shard_size": 4}) == Mesh(replicate=2, shard=4)
    assert mesh(2, tensor=2) == Mesh(tensor=2)
    environ = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
    assert mesh(4, environ, fsdp=True) == Mesh(shard=2, context=2)
    assert resolve_strategy(TrainingArguments(fsdp=True, parallelism_config=sizes), LAUNCHED, world_size=8) == FSDP(replicate=2)
    assert (
        resolve_strategy(TrainingArguments(), LAUNCHED, world_size=2, tp_size=2) == SingleProcess()
    )  # the same examples for both
    assert [data_parallel_rank_and_size(rank, Mesh(shard=2, context=2)) for rank in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_sizes_that_do_not_fit():
    for world, message, arguments in (
        (4, "cannot be divided into groups of 3", {"parallelism_config": {"tp_size": 3}}),
        (4, "Add fsdp=True", {"parallelism_config": {"tp_size": 2}}),
        (4, "nothing is sharded. Add fsdp=True", {"parallelism_config": {"dp_shard_size": 4}}),
        (6, "lays out 4 processes .* but 6 were started", {"fsdp": True, "parallelism_config": {"dp_shard_size": 4}}),
        (2, "lays out 3 processes .* but 2 were started", {"parallelism_config": {"dp_replicate_size": 3}}),
    ):
        with pytest.raises(ArgumentError, match=message):
            mesh(world, **arguments)
    with pytest.raises(ArgumentError, match="loaded with tp_size=2, but the parallelism config says 4"):
        mesh(8, tensor=2, fsdp=True, parallelism_config={"tp_size": 4})
    with pytest.raises(ArgumentError, match="mutually exclusive"):
        TrainingArguments(parallelism_config={"cp_size": 2, "sp_size": 2})
    with pytest.raises(ArgumentError, match="must be accelerate's ParallelismConfig"):
        TrainingArguments(parallelism_config=object())
