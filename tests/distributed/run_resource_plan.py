"""Bytes of real models in one training step, for test_resource_plan: `torchrun run_resource_plan.py FILE`."""

import json
import math
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fts import transforms as tx
from fts.distributed.fsdp import fully_shard
from fts.distributed.strategies import FSDP

EXAMPLES, TOKENS = 2, 12
KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}


class CollectiveCounter(TorchDispatchMode):
    """Bytes of the full tensors of each collective; also of those that DDP starts from C++."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional") and name in KINDS:
            tensors = args[0] if isinstance(args[0], (list, tuple)) else args[:2]
            tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
            if all(tensor.is_floating_point() for tensor in tensors):
                full = sum if name == "allreduce_" else max  # of a gather the output, of a scatter the input
                times = dist.get_world_size() if name == "all_gather_into_tensor" else 1  # called with its input only
                self.calls.append((KINDS[name], times * full(tensor.nbytes for tensor in tensors)))
                self.storages |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return func(*args, **(kwargs or {}))


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=1000, hidden_size=96, num_hidden_layers=3, num_attention_heads=3, intermediate_size=200, num_labels=3
        )
    )


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=500,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=160,
        )
    )


def replicated(**options):
    model = bert()
    return model, DistributedDataParallel(model, **options), lambda last: None


def sharded(*, no_sync=False, parameters=None, mesh=None, **options):
    model = bert().to(parameters)
    mesh = mesh or dist.init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh, FSDP(units=("BertLayer",), **options))
    return model, model, model.set_requires_gradient_sync if no_sync else (lambda last: None)


def tensor_parallel():
    model = llama()
    plan = {
        name: ColwiseParallel()
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    plan = {f"model.layers.*.{name}": style for name, style in plan.items()} | {
        "lm_head": ColwiseParallel(output_layouts=Replicate())
    }
    parallelize_module(model, dist.init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    return model, model, lambda last: None


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors):
    return sum(local(tensor).nbytes for tensor in tensors)


def measure(model, call, sync, accumulate, labels):
    """One step's bytes."""
    ids = torch.randint(0, 500, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
    with CollectiveCounter() as counter:
        for index in range(accumulate):
            last = index == accumulate - 1
            sync(last)
            if isinstance(call, DistributedDataParallel) and not last:
                with call.no_sync():
                    call(input_ids=ids, labels=labels(ids)).loss.backward()
            else:
                call(input_ids=ids, labels=labels(ids)).loss.backward()
    parameters = dict(model.named_parameters())
    gradients = [local(parameter.grad) for parameter in parameters.values() if parameter.grad is not None]
    state = tx.adamw(1e-3).init(parameters)
    found = {"parameters": nbytes(parameters.values()), "gradients": nbytes(gradients)}
    found["moments"] = nbytes(
        tensor for tensor in torch.utils._pytree.tree_leaves(state) if tensor.ndim or math.prod(tensor.shape) > 1
    )
    found["count"] = sum(parameter.numel() for parameter in parameters.values())
    own = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    found["buckets"] = sum(size for storage, size in counter.storages.items() if storage not in own)
    found["exchanged"] = {
        kind: sum(size for name, size in counter.calls if name == kind) for kind in sorted({name for name, _ in counter.calls})
    }
    found["largest gathered"] = max([size for name, size in counter.calls if name == "all-gather"], default=0)
    return found


def main(file):
    dist.init_process_group("gloo")
    classes = lambda ids: torch.zeros(len(ids), dtype=torch.long)  # noqa: E731
    cases = {
        "ddp": (replicated(gradient_as_bucket_view=True), 2, classes),
        "ddp, buckets apart": (replicated(), 1, classes),
        "fsdp": (sharded(), 2, classes),
        "fsdp, not resharded": (sharded(reshard_after_forward=False), 2, classes),
        "fsdp, no sync": (sharded(no_sync=True), 2, classes),
        "fsdp, bf16": (sharded(param_dtype=torch.bfloat16), 1, classes),
        "fsdp, bf16-pure": (sharded(parameters=torch.bfloat16), 1, classes),
        "tp": (tensor_parallel(), 2, lambda ids: ids),
    }
    if dist.get_world_size() == 4:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        cases["hsdp"] = (sharded(mesh=mesh, replicate=2), 2, classes)
    found = {name: measure(*case, accumulate, labels) for name, (case, accumulate, labels) in cases.items()}
    every_rank = [None] * dist.get_world_size()
    dist.all_gather_object(every_rank, found)
    if dist.get_rank() == 0:
        with open(file, "w") as out:
            json.dump(every_rank, out, indent=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
