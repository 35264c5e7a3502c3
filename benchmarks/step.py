"""Time per training step, as ratios against a hand-written loop, interleaved in one process.

    python benchmarks/step.py [--rounds 15] [--threads 2] [--only mlp]

Every candidate trains the same model on the same examples in the same order with AdamW (no decay for biases and norms, as
in the Trainer), clipping by global norm and a linear schedule, data fetching included. The hand-written loop indexes
tensors (no DataLoader), uses the fused optimizer and sets the rate itself. In each round all candidates run one after
another, in a rotating order; the ratio is taken round by round, and its median is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fts
from fts import loops, steps, transforms as tx

RATE, DECAY, CLIP, BATCH_SIZE = 1e-3, 0.01, 1.0, 32


@attrs.frozen
class Task:
    """A model and data for all candidates; `steps` is the number of steps in a round."""

    name: str
    model: Callable[[], nn.Module]
    data: dict[str, torch.Tensor]
    steps: int


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class SmallTransformer(nn.Module):
    """Two encoder layers of width 128 over 32 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.encoder(self.embed(x)).mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def tasks() -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (6400,), generator=generator)
    return [
        Task("mlp", Mlp, {"x": torch.randn(6400, 64, generator=generator), "labels": labels}, 1000),
        Task(
            "transformer",
            SmallTransformer,
            {"x": torch.randint(0, 1000, (640, 32), generator=generator), "labels": labels[:640]},
            20,
        ),
    ]


def decayed_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]


def rate_at(step: int, total: int) -> float:
    return RATE * max(0.0, 1 - step / total)


def hand_written(task: Task, total: int) -> Callable[[], None]:
    model = new_model(task).train()
    parameters = list(model.parameters())
    decayed = decayed_names(model)
    groups = [
        {"params": [p for name, p in model.named_parameters() if name in decayed], "weight_decay": DECAY},
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    num_examples = len(task.data["labels"])
    taken = epoch = 0

    def run_steps() -> None:
        nonlocal taken, epoch
        order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(epoch)).split(BATCH_SIZE)
        epoch += 1
        for index in range(task.steps):
            chosen = order[index % len(order)]
            batch = {key: tensor[chosen] for key, tensor in task.data.items()}
            loss = model(**batch)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(taken, total)
            optimizer.step()
            optimizer.zero_grad()
            taken += 1

    return run_steps


def core(task: Task, total: int, *, compiled: bool = False, donate: bool = True) -> Callable[[], None]:
    model = new_model(task).train()
    optimizer = tx.chain(
        tx.clip_by_global_norm(CLIP),
        tx.adamw(tx.linear_schedule(RATE, 0.0, total), weight_decay=DECAY, mask=decayed_names(model)),
    )
    loss = steps.module_loss(model, lambda model, batch: model(*batch)["loss"])
    step: Any = steps.train_step(loss, optimizer, donate=donate)
    if compiled:
        step = steps.compile(step)
    state = fts.TrainState.create(model, optimizer, seed=0)
    source = loops.source(TensorDataset(*task.data.values()), batch_size=BATCH_SIZE, shuffle=True)
    position = loops.Position()

    def run_steps() -> None:
        nonlocal state, position
        end = int(state.step) + task.steps
        run = loops.fit(step, state, source, total_steps=end, start=position, due=loops.cadence(log=100), donate=donate)
        last: Any = deque(run, maxlen=1).pop()
        state, position = last.state, last.counters.position

    return run_steps


def trainer(task: Task, total: int) -> Callable[[], float]:
    from fts import Trainer, TrainingArguments

    def run_steps() -> float:
        """The seconds of `train` alone, since a Trainer is built once per run."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            arguments = TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH_SIZE,
                max_steps=task.steps,
                learning_rate=RATE,
                weight_decay=DECAY,
                max_grad_norm=CLIP,
                logging_steps=100,
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            )
            runner = Trainer(
                model=new_model(task), args=arguments, train_dataset=Columns(task.data), data_collator=lambda batch: batch
            )
            started = time.perf_counter()
            runner.train()
            return time.perf_counter() - started

    return run_steps


class Columns(torch.utils.data.Dataset):
    """Examples from a few tensors; `__getitems__` fetches a batch at once, as torch's loaders allow."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: tensor[index] for key, tensor in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        chosen = torch.tensor(indices)
        return {key: tensor[chosen] for key, tensor in self.columns.items()}


def new_model(task: Task) -> nn.Module:
    torch.manual_seed(0)
    return task.model()


CANDIDATES: dict[str, Callable[..., Callable[[], float | None]]] = {
    "hand": hand_written,
    "fts core, donated": core,
    "fts core, pure": functools.partial(core, donate=False),
    "fts core, compiled": functools.partial(core, compiled=True),
    "fts Trainer": trainer,
}


def measure(task: Task, rounds: int, names: list[str]) -> dict[str, list[float]]:
    """Seconds per step of each candidate in each round."""
    total = (rounds + 1) * task.steps
    runners = {name: CANDIDATES[name](task, total) for name in names}
    for run_steps in runners.values():  # a warm-up round: fills caches, compiles graphs
        run_steps()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            started = time.perf_counter()
            own = runners[name]()
            seconds[name].append((time.perf_counter() - started if own is None else own) / task.steps)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", help="the name of one task")
    parser.add_argument("--candidates", nargs="*", default=list(CANDIDATES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds")
    for task in tasks():
        if options.only not in (None, task.name):
            continue
        seconds = measure(task, options.rounds, options.candidates)
        print(f"\n{task.name}: {task.steps} steps per round\n{'':<22}{'us per step':>12}{'ratio':>8}{'min':>8}{'max':>8}")
        for name, times in seconds.items():
            ratios = [own / base for own, base in zip(times, seconds[options.candidates[0]], strict=True)]
            columns = f"{statistics.median(ratios):>8.2f}{min(ratios):>8.2f}{max(ratios):>8.2f}"
            print(f"{name:<22}{1e6 * statistics.median(times):>12.1f}{columns}")


if __name__ == "__main__":
    main()
