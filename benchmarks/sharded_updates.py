"""Clipping and AdamW on the shards of `fully_shard`: fts against torch, on the same gradients, alternating.

torchrun --nproc-per-node 2 benchmarks/sharded_updates.py
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fts
from fts import transforms as tx

ROUNDS, UPDATES = 12, 5


def model(width: int) -> nn.Module:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = [nn.Sequential(nn.Linear(width, 4 * width), nn.LayerNorm(4 * width), nn.Linear(4 * width, width)) for _ in range(16)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(nn.Sequential(*layers), mesh=mesh)


def torchs(width: int, **options: bool) -> Callable[[], None]:
    module = model(width)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1, **options)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)

    def update() -> None:
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return update


def ours(width: int) -> Callable[[], None]:
    optimizer = tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(1e-3, weight_decay=0.1))
    state = fts.TrainState.create(model(width), optimizer)
    params, opt_state = state.params, state.opt_state
    grads = {name: torch.full_like(parameter, 1e-3) for name, parameter in params.items()}

    def update() -> None:
        nonlocal params, opt_state
        with torch.no_grad():
            params, opt_state, _ = optimizer.apply(grads, opt_state, params)

    return update


def measured(update: Callable[[], None]) -> float:
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(UPDATES):
        update()
    return (time.perf_counter() - begin) / UPDATES * 1e3


def main() -> None:
    dist.init_process_group("gloo")
    for width in (32, 128):
        contenders = {
            "fts": ours(width),
            "torch, foreach": torchs(width, foreach=True),
            "torch, fused": torchs(width, fused=True),
            "torch, as it chooses": torchs(width),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(ROUNDS):
            for name, update in contenders.items():
                times[name].append(measured(update))
        if dist.get_rank() == 0:
            base = statistics.median(times["fts"])
            for name, values in times.items():
                print(f"width {width}: {name:<22} {statistics.median(values):8.2f} ms  {statistics.median(values) / base:5.2f}x")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
