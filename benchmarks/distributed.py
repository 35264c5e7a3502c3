"""Time per step of two processes, as ratios against hand-written loops of torch's DDP and `fully_shard`, interleaved in one run.

    python benchmarks/distributed.py [--rounds 15] [--only bert]

Both train the same model on the same examples with AdamW, clipping by global norm and a linear schedule; each rank has one
thread and half of each batch. The hand-written loops index tensors, use the fused optimizer and set the rate themselves;
FSDP shards each layer, and the rest. In each round all candidates run one after another, in a rotating order, each after a
barrier; the ratio is taken round by round, and its median is printed. The target is a ratio of at most 1.05. `processor` is the
ratio of processor times, which do not grow while ranks wait for each other, or when the machine is busy.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import distributed as dist, nn
from torch.distributed import fsdp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import fts
from fts import loops, steps, transforms as tx
from fts.distributed import DDP, FSDP, Group, destroy_process_group, distribute, init_process_group
from fts.distributed.fsdp import fully_shard

RATE, DECAY, CLIP, BATCH_SIZE = 1e-3, 0.01, 1.0, 32
"""`BATCH_SIZE` is that of one rank."""


@attrs.frozen
class Task:
    """A model and data for all candidates; FSDP gathers each `unit` as one; `steps` is how many steps one run_steps takes."""

    name: str
    model: Callable[[], nn.Module]
    unit: str
    data: dict[str, torch.Tensor]
    steps: int


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.linear(x))


class Mlp(nn.Module):
    """1.1 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 512), *(Block(512) for _ in range(4)), nn.Linear(512, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Bert(nn.Module):
    """Four layers of width 192."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = BertForSequenceClassification(BertConfig(vocab_size=2000, num_labels=10, **sizes, **dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=x).logits


def tasks() -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (6400,), generator=generator)
    words = torch.randint(0, 2000, (640, 32), generator=generator)
    return [
        Task("mlp", Mlp, "Block", {"x": torch.randn(6400, 64, generator=generator), "labels": labels}, 50),
        Task("bert", Bert, "BertLayer", {"x": words, "labels": labels[:640]}, 10),
    ]


def new_model(task: Task) -> nn.Module:
    torch.manual_seed(0)
    return task.model().train()


def shard_layers(model: nn.Module, unit: str) -> nn.Module:
    for module in reversed(list(model.modules())):
        if type(module).__name__ == unit:
            fsdp.fully_shard(module)
    return fsdp.fully_shard(model, reshard_after_forward=False)


def hand_written(task: Task, total: int, group: Group, strategy: DDP | FSDP) -> Callable[[], None]:
    model = new_model(task)
    model = DistributedDataParallel(model) if isinstance(strategy, DDP) else shard_layers(model, task.unit)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY, fused=True)
    num_examples = len(task.data["labels"])
    taken = epoch = 0

    def run_steps() -> None:
        nonlocal taken, epoch
        order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(epoch)).split(BATCH_SIZE)[
            group.rank :: group.size
        ]
        epoch += 1
        for index in range(task.steps):
            chosen = order[index % len(order)]
            batch = {key: tensor[chosen] for key, tensor in task.data.items()}
            loss = F.cross_entropy(model(batch["x"]), batch["labels"])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            for group_of_parameters in optimizer.param_groups:
                group_of_parameters["lr"] = RATE * max(0.0, 1 - taken / total)
            optimizer.step()
            optimizer.zero_grad()
            taken += 1

    return run_steps


def with_fts(task: Task, total: int, group: Group, strategy: DDP | FSDP) -> Callable[[], None]:
    model = new_model(task)
    if isinstance(strategy, FSDP):
        fully_shard(model, dist.init_device_mesh("cpu", (group.size,)), strategy)
    optimizer = tx.chain(
        tx.clip_by_global_norm(CLIP),
        tx.adamw(tx.linear_schedule(RATE, 0.0, total), weight_decay=DECAY),
    )
    loss = steps.module_loss(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    step: Any = distribute(
        steps.train_step(loss, optimizer, donate=True), group, strategy if isinstance(strategy, DDP) else DDP()
    )
    state = fts.TrainState.create(model, optimizer, seed=0)
    source = loops.shard_source(
        loops.source(TensorDataset(*task.data.values()), batch_size=BATCH_SIZE, shuffle=True), group.rank, group.size
    )
    position = loops.Position()

    def run_steps() -> None:
        nonlocal state, position
        end = int(state.step) + task.steps
        run = loops.fit(step, state, source, total_steps=end, start=position, due=loops.cadence(log=100), donate=True)
        last: Any = deque(run, maxlen=1).pop()
        state, position = last.state, last.counters.position

    return run_steps


def measure(task: Task, rounds: int, group: Group) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds per step of each candidate in each round."""
    total = (rounds + 1) * task.steps
    strategies: list[DDP | FSDP] = [DDP(), FSDP(units=(task.unit,))]
    runners = {
        f"{strategy.name}, {name}": candidate(task, total, group, strategy)
        for strategy in strategies
        for name, candidate in (("by hand", hand_written), ("fts", with_fts))
    }
    for run_steps in runners.values():
        run_steps()
    names = list(runners)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            group.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            runners[name]()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            seconds[name].append((wall / task.steps, processor / task.steps))
    return seconds


def report(seconds: dict[str, list[tuple[float, float]]]) -> None:
    print(f"{'':<22}{'us per step':>12}{'ratio':>8}{'min':>8}{'max':>8}{'processor':>12}")
    for name, times in seconds.items():
        base = seconds[f"{name.split(',')[0]}, by hand"]
        ratios, of_processor = ([own[k] / other[k] for own, other in zip(times, base, strict=True)] for k in (0, 1))
        columns = (
            f"{statistics.median(ratios):>8.2f}{min(ratios):>8.2f}{max(ratios):>8.2f}{statistics.median(of_processor):>12.2f}"
        )
        print(f"{name:<22}{1e6 * statistics.median(wall for wall, _ in times):>12.1f}{columns}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="the name of one task")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        command = [*launcher, "--rdzv-endpoint", "127.0.0.1:0", __file__, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)
    torch.set_num_threads(1)
    group = init_process_group(device="cpu")
    if group.is_main_process:
        print(f"torch {torch.__version__}, {group.size} processes of one thread, {options.rounds} rounds")
    for task in tasks():
        if options.only in (None, task.name):
            seconds = measure(task, options.rounds, group)
            if group.is_main_process:
                print(f"\n{task.name}: {task.steps} steps per round")
                report(seconds)
    destroy_process_group()


if __name__ == "__main__":
    main()
