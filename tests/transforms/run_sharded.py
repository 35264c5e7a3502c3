"""Every transform on sharded tensors: started by torchrun, writes what is wrong to `folder/<rank>.json`.

torchrun --nproc-per-node 2 tests/transforms/run_sharded.py folder [parts of the names of checks]
"""

import json
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import lion_pytorch
import prodigyopt
import pytest
import schedulefree
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.optimization import Adafactor

import fts
from fts import steps, transforms as tx
from fts.dtensors import full_tensor, is_dtensor
from fts.errors import ArgumentError
from fts.randomness import randn_like
from fts.steps.nonfinite import NonFiniteCounts, find_nonfinite
from fts.testing.comparison import require_close, require_equal, transform_summary
from fts.testing.sharded import SHARDING_LAYOUTS, full_tensors, shard_tensors, sharded_equals_full
from fts.typing import Params, Transform
from tests.laws.test_transforms import EAGER_REGISTRY, NAMED_REGISTRY, REGISTRY
from tests.transforms.run_sharded_16_bit import low_precision_equals_full_tensors, overflow_on_one_rank_is_skipped_on_all

# on two ranks: 2 and 1 rows, 1 and none; on four, one or two have none
SHAPES = {"w": (3, 4), "b": (1,), "layers.10.norm.weight": (5,), "kernel": (2, 3, 2, 2), "temperature": ()}
KNOWN = ("w", "b", "layers.10.norm.weight")

BRIDGED = [
    tx.from_torch(torch.optim.Adafactor, lr=0.1, weight_decay=0.1),
    tx.from_torch(Adafactor, lr=0.1, beta1=0.9, relative_step=False),
    tx.from_torch(torch.optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
    tx.from_torch(torch.optim.AdamW, lr=0.1, amsgrad=True),
    tx.chain(tx.clip_by_global_norm(1.0), tx.from_torch(schedulefree.AdamWScheduleFree, lr=0.1)),
    tx.from_torch(lion_pytorch.Lion, lr=0.01),
]

# Those that flatten parameters, or pick from them.
REFUSED = [
    tx.from_torch(torch.optim.LBFGS, closure=lambda params: (torch.zeros(()), params)),
    tx.from_torch(torch.optim.Rprop, lr=0.1),
    tx.from_torch(prodigyopt.Prodigy),
]


def tensors(names: tuple[str, ...], dtype: torch.dtype, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype) for name in names}


def trajectory(names: tuple[str, ...], dtype: torch.dtype, updates: int) -> tuple[Params, list[Params]]:
    """Gradients of growing size, so that clipping acts on some."""
    gradients = [{key: g * (0.02 + i) for key, g in tensors(names, dtype, 1 + i).items()} for i in range(updates)]
    return tensors(names, dtype, 0), gradients


def laws(layouts: list[str], dtype: torch.dtype, updates: int) -> dict[str, Callable[[], None]]:
    named = [(transform, KNOWN) for transform in NAMED_REGISTRY]
    every = [(transform, tuple(SHAPES)) for transform in (*REGISTRY, *EAGER_REGISTRY, *BRIDGED)]
    return {
        f"{transform_summary(transform)}, {layout}, {dtype}": partial(
            sharded_equals_full, transform, *trajectory(names, dtype, updates), layout=layout
        )
        for transform, names in every + named
        for layout in layouts
    }


def refuses_sharded_parameters(transform: Transform) -> None:
    with pytest.raises(ArgumentError, match="cannot step on sharded parameters"):
        transform.init(shard_tensors(tensors(KNOWN, torch.float64, 0), "fsdp"))


def norm_is_that_of_full_tensors() -> None:
    full_tree = tensors(tuple(SHAPES), torch.float32, 0)
    for scale in (1.0, 1e15):
        tree = {name: tensor * scale for name, tensor in full_tree.items()}
        for layout in SHARDING_LAYOUTS:
            torch.testing.assert_close(tx.global_norm(shard_tensors(tree, layout)), tx.global_norm(tree), rtol=1e-6, atol=0.0)
    # gradients with a partial placement
    from torch.distributed.tensor import DTensor, Partial

    part = DTensor.from_local(torch.ones(4), init_device_mesh("cpu", (dist.get_world_size(),)), [Partial()])
    torch.testing.assert_close(tx.global_norm([part]), torch.tensor(2.0 * dist.get_world_size()))


def noise_is_that_of_full_tensors() -> None:
    tree = tensors(tuple(SHAPES), torch.float64, 0)
    for layout in SHARDING_LAYOUTS:
        for name, tensor in shard_tensors(tree, layout).items():
            require_equal(name, full_tensor(randn_like(tensor, 3, 7)), randn_like(tree[name], 3, 7))


def nonfinite_numbers_are_counted_once() -> None:
    tree = tensors(tuple(SHAPES), torch.float64, 0)
    assert find_nonfinite(shard_tensors(tree, "fsdp")) == {}
    tree["w"][2, 1] = float("nan")
    tree["kernel"][0] = float("inf")
    for layout in SHARDING_LAYOUTS:
        found = find_nonfinite(shard_tensors(tree, layout))
        assert found == {"w": NonFiniteCounts(1, 0, 12), "kernel": NonFiniteCounts(0, 12, 24)}, found


def as_torch(make_optimizer: Callable[..., torch.optim.Optimizer], transform: Transform) -> None:
    """Ten updates of a module under `fully_shard` with clipping, against torch's optimizer on the same module."""

    def module() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.LayerNorm(3)).double()
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))

    theirs, ours = module(), module()
    optimizer = make_optimizer(theirs.parameters())
    full = tx.chain(tx.clip_by_global_norm(0.5), transform)
    state = fts.TrainState.create(ours, full)
    for i in range(10):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(i)
        theirs(torch.randn(6, 5, generator=generator, dtype=torch.float64)).square().sum().backward()
        grads = {name: p.grad.clone() for name, p in theirs.named_parameters()}
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        state, info = steps.apply_gradients(state, grads, full, donate=bool(i % 2))
        require_close("grad_norm", info["grad_norm"], full_tensor(norm), tolerance_factor=0.01)
        for name, parameter in theirs.named_parameters():
            require_close(name, full_tensor(state.params[name]), full_tensor(parameter.detach()), tolerance_factor=0.01)


def states_have_shards() -> None:
    tree = tensors(KNOWN, torch.float32, 0)
    transform = tx.ema_params(tx.adamw(0.1), 0.9)
    plain = fts.TrainState.create(tree, transform)
    sharded = fts.TrainState.create(shard_tensors(tree, "fsdp"), transform)
    assert "3 tensors with 18 numbers" in repr(sharded)
    grads = tensors(KNOWN, torch.float32, 1)
    plain, _ = steps.apply_gradients(plain, grads, transform)
    kept = {name: full_tensor(tensor) for name, tensor in sharded.params.items()}
    after, _ = steps.apply_gradients(sharded, shard_tensors(grads, "fsdp"), transform)
    require_equal("the old state", full_tensors(sharded.params), kept)
    require_close("params", full_tensors(after.params), plain.params)
    # gradients in another layout are brought to that of the parameters
    other, _ = steps.apply_gradients(sharded, grads, transform)
    require_equal("params", full_tensors(other.params), full_tensors(after.params))
    # averages do not share memory with parameters
    again, _ = steps.apply_gradients(after, shard_tensors(grads, "fsdp"), transform, donate=True)
    assert all(is_dtensor(tensor) for tensor in (*again.params.values(), *tx.averaged_params(again.opt_state).values()))

    moments = tx.torch_moments(plain.opt_state)
    restored = tx.adamw(0.1).init(shard_tensors(tree, "fsdp"))
    from fts.transforms.from_torch_state import with_torch_moments

    restored = with_torch_moments(restored, moments, step=1)
    require_equal("moments", full_tensors(restored), plain.opt_state.inner)
    require_equal("moments", full_tensors(tx.torch_moments(restored)), moments)

    # what a single process saved, in shards, and back in a module that is not sharded
    directory = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(directory)
    if dist.get_rank() == 0:
        plain.save(Path(directory[0]))
    dist.barrier()
    loaded = fts.TrainState.load(Path(directory[0]), like=again)
    require_equal("params", full_tensors(loaded.params), plain.params)
    require_equal("opt_state", full_tensors(loaded.opt_state), plain.opt_state)
    assert all(is_dtensor(tensor) for tensor in loaded.params.values())

    model = nn.Linear(4, 3)
    linear = fts.TrainState.create(
        fully_shard(nn.Linear(4, 3), mesh=init_device_mesh("cpu", (dist.get_world_size(),))), tx.sgd(0.1)
    )
    linear.apply_to(model)
    require_equal("module", dict(model.state_dict()), full_tensors(linear.params))


def checks() -> dict[str, Callable[[], None]]:
    every = list(SHARDING_LAYOUTS)
    compared = {
        "AdamW": (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, fused=True), tx.adamw(0.1, weight_decay=0.1)),
        "Adam": (partial(torch.optim.Adam, lr=0.1), tx.adam(0.1)),
        "SGD": (partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True), tx.sgd(0.1, momentum=0.9, nesterov=True)),
        "bridged AdamW": (partial(torch.optim.AdamW, lr=0.1), tx.from_torch(torch.optim.AdamW, lr=0.1)),
    }
    return {
        **laws(every[:1], torch.float64, 3),
        # on two ranks the other layouts have one rank along one axis
        **(laws(every[1:], torch.float64, 2) | laws(every, torch.float32, 3) if dist.get_world_size() > 2 else {}),
        **{
            f"{transform_summary(transform)} refuses sharded parameters": partial(refuses_sharded_parameters, transform)
            for transform in REFUSED
        },
        **{f"{name} is torch's": partial(as_torch, *pair) for name, pair in compared.items()},
        **{
            check.__name__: check
            for check in (
                norm_is_that_of_full_tensors,
                noise_is_that_of_full_tensors,
                nonfinite_numbers_are_counted_once,
                states_have_shards,
                low_precision_equals_full_tensors,
                overflow_on_one_rank_is_skipped_on_all,
            )
        },
    }


def main(folder: str, *parts: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    results: dict[str, str] = {}
    parts = parts or ("",)
    for name, check in checks().items():
        if not any(part in name for part in parts):
            continue
        try:
            check()
            results[name] = ""
        except Exception as error:  # noqa: BLE001  # the test reads it
            results[name] = f"{type(error).__name__}: {error}"
            if "closure" in results[name] or "Timed out" in results[name]:  # the ranks are no longer in step
                break
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
