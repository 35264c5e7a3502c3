"""The Trainer under each strategy, for test_strategy: `torchrun run_strategies.py FILE`, or python for one process."""

import json
import os
import sys
import tempfile

import torch
import transformers

from fts import Trainer, TrainingArguments
from fts.distributed import destroy_process_group, distributed_step
from fts.dtensors import to_local
from fts.errors import ArgumentError

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BLOCKS = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
LAUNCHER = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
CASES = {
    "ddp": {
        "ddp_find_unused_parameters": False,
        "ddp_bucket_cap_mb": 3,
        "ddp_broadcast_buffers": False,
        "ddp_static_graph": True,
        "ddp_backend": "gloo",
        "ddp_timeout": 77,
    },
    "ddp, accumulating": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "fsdp": {"fsdp": "full_shard auto_wrap", "fsdp_config": BLOCKS},
    "fsdp, by size, recomputing": {"fsdp": True, "fsdp_config": {"min_num_params": 3000, "activation_checkpointing": True}},
    "fsdp, accumulating": {"fsdp": ["shard_grad_op"], "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "fsdp of the launcher": {},
    "matrices": {"parallelism_config": {"tp_size": 2}, "per_device_train_batch_size": 8},
}
TOGETHER = {"matrices": 2}


def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=4, use_cache=False))


def make_examples():
    tokens = torch.randint(0, 101, (40, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trained(world, folder, name):
    """The losses, and what became of the model, of 8 examples in each update."""
    options = {"per_device_train_batch_size": 8, **CASES[name]}
    options["per_device_train_batch_size"] //= world // TOGETHER.get(name, 1) if world > 1 else 1
    if world == 1:
        options = {key: value for key, value in options.items() if not key.startswith(("ddp", "fsdp", "parallelism"))}
    args = TrainingArguments(
        folder, max_steps=5, logging_steps=1, learning_rate=1e-2, use_cpu=True, save_strategy="no", disable_tqdm=True, **options
    )
    trainer = Trainer(model(), args, train_dataset=make_examples(), eval_dataset=make_examples()[:11])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    parts = [to_local(parameter).numel() for parameter in trainer.model.parameters()]
    return {
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "evaluated": trainer.evaluate()["eval_loss"],
        "sizes": [trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()],
        "examples": trainer.get_total_train_batch_size(args),
        "units": sum(hasattr(part, "set_requires_gradient_sync") for part in trainer.model.modules()),
        "share": sum(parts) / sum(parameter.numel() for parameter in trainer.model.parameters()),
    }


def evaluated(folder, **options):
    """The loss of a model that was not trained, and which part of it this process has then."""
    args = TrainingArguments(folder, use_cpu=True, disable_tqdm=True, **options)
    trainer = Trainer(model(), args, eval_dataset=make_examples()[:11])
    loss = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(make_examples()[:11]).metrics["test_loss"]
    parts = [to_local(parameter).numel() for parameter in trainer.model.parameters()]
    return [loss, predicted, sum(parts) / sum(parameter.numel() for parameter in trainer.model.parameters())]


def refused(folder, **options):
    try:
        Trainer(model(), TrainingArguments(folder, use_cpu=True, **options), train_dataset=make_examples())
    except ArgumentError as error:
        return str(error)
    return ""


def main(file):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    given = {}

    def noting(function, name):
        def call(*args, **options):
            given.setdefault(name, {key: str(value) for key, value in options.items()})
            return function(*args, **options)

        return call

    ddp = torch.nn.parallel.DistributedDataParallel
    ddp.__init__ = noting(ddp.__init__, "DDP")
    replicating = distributed_step.DDPGradients

    def noted(group, broadcast_buffers, **options):
        given.setdefault("buffers", broadcast_buffers)
        return replicating(group, broadcast_buffers, **options)

    distributed_step.DDPGradients = noted
    torch.distributed.init_process_group = noting(torch.distributed.init_process_group, "group")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            os.environ |= LAUNCHER if "launcher" in name and world > 1 else {"ACCELERATE_USE_FSDP": "false"}
            found[name] = trained(world, folder, name)
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        found["evaluated"] = evaluated(folder, **({"fsdp": True, "fsdp_config": BLOCKS} if world > 1 else {}))
        found["evaluated in matrices"] = evaluated(folder, **({"parallelism_config": {"tp_size": 2}} if world > 1 else {}))
        if world > 1:
            found["given"] = given
            found["batch size"] = refused(folder, auto_find_batch_size=True)
            found["cp"] = refused(folder, parallelism_config={"cp_size": 2})
            found["sp"] = refused(folder, parallelism_config={"sp_size": 2})
            found["tp"] = refused(folder, parallelism_config={"tp_size": 3})
    if os.environ.get("RANK", "0") == "0":
        with open(file, "w", encoding="utf-8") as handle:
            json.dump(found, handle)
    destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
