"""The cost of a checkpoint for training, in step times; each candidate in processes of its own, interleaved.

    python benchmarks/checkpoint.py [--repeats 3] [--saves 4] [--batch 128] [--threads 2] [--only fts "torch.save"]

The model has 20 million parameters; with the two moments of AdamW a checkpoint has 228 MiB. A run trains in windows of 8 steps,
of which every other one has a save after its second step. `waits` is the time by which the step of the save exceeds the median
step: the time that the loop waits. `total` is the time by which the window exceeds the two next to it: the loop's wait, and the
slowdown of later steps by an asynchronous writer. Both are in steps of the same run, medians over all saves. `processor` is like
`total`, for the processor time of the process: it varies less on a busy machine. Target: a total of at most 0.4 for fts, with
checksums and all files flushed to the disk (the peers do neither). Temporary files must be on a disk, not in memory: set TMPDIR.
"transformers" and "lightning" are skipped if they are not installed.

The last line counts the examples that are read to resume in the middle of an epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.data import Dataset

import fts
from fts import loops, steps, transforms as tx

WIDTH, LAYERS, RATE = 1024, 19, 1e-4
WINDOW, AT = 8, 2
"""The number of steps in a window, and the step after which it saves."""


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.layers(x)
        return {"loss": output.square().mean()}


class Examples(Dataset[dict[str, torch.Tensor]]):
    """A data set that repeats a few examples; counts the reads."""

    def __init__(self, count: int, width: int = WIDTH) -> None:
        self.count, self.read, self.examples = count, 0, torch.randn(64, width)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read += 1
        return {"x": self.examples[index % 64]}


@attrs.define
class Clock:
    """The start time of each step."""

    windows: int
    wall: list[float] = attrs.field(factory=list)
    processor: list[float] = attrs.field(factory=list)

    @property
    def steps(self) -> int:
        return self.windows * WINDOW

    def tick(self) -> None:
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    @staticmethod
    def due(step: int) -> bool:
        """Whether to save after so many steps."""
        return step // WINDOW % 2 == 1 and step % WINDOW == AT


# Contestants


def fts_core(data: Examples, batch: int, clock: Clock, folder: str, *, background: bool = True) -> None:
    net, optimizer = Mlp(), tx.adamw(RATE, weight_decay=0.01)
    step = steps.train_step(steps.module_loss(net, lambda model, inputs: model(**inputs)["loss"]), optimizer)
    state = fts.TrainState.create(net, optimizer)

    def due(counters: loops.Counters) -> loops.Due:
        return loops.Due(save=clock.due(counters.step))

    with loops.AsyncCheckpointer(background=background) as writer:

        def save(state: fts.TrainState, position: loops.Position) -> Path:
            return writer.save(f"{folder}/checkpoint-{int(state.step)}", state, position)

        source = loops.source(data, batch_size=batch)
        for event in writer.watch(loops.fit(step, state, source, total_steps=clock.steps, due=due, save=save)):
            if isinstance(event, loops.StepBegin):
                clock.tick()


def fts_synchronous(data: Examples, batch: int, clock: Clock, folder: str) -> None:
    fts_core(data, batch, clock, folder, background=False)


def hand_written(data: Examples, batch: int, clock: Clock, folder: str) -> None:
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    for step in range(1, clock.steps + 1):
        clock.tick()
        x = torch.stack([data[index]["x"] for index in range((step - 1) * batch, step * batch)])
        model(x)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if clock.due(step):
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/{step}.pt")


def any_trainer(package: Any, data: Examples, batch: int, clock: Clock, folder: str) -> None:
    class Saving(package.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.tick()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = clock.due(state.global_step)

    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_strategy": "no"}
    args = package.TrainingArguments(
        folder, per_device_train_batch_size=batch, max_steps=clock.steps, learning_rate=RATE, optim="adamw_torch_fused", **options
    )
    package.Trainer(Mlp(), args, train_dataset=data, callbacks=[Saving()]).train()


def fts_trainer(data: Examples, batch: int, clock: Clock, folder: str) -> None:
    any_trainer(fts, data, batch, clock, folder)


def transformers_trainer(data: Examples, batch: int, clock: Clock, folder: str) -> None:
    import transformers

    any_trainer(transformers, data, batch, clock, folder)


def lightning(data: Examples, batch: int, clock: Clock, folder: str) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Mlp()

        def training_step(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.model(**inputs)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), RATE, fused=True)

    class Saving(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.tick()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if clock.due(trainer.global_step):
                trainer.save_checkpoint(f"{folder}/{trainer.global_step}.ckpt")

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=clock.steps, callbacks=[Saving()], default_root_dir=folder, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch))


CANDIDATES: dict[str, Callable[[Examples, int, Clock, str], None]] = {
    "fts": fts_core,
    "fts, in the loop": fts_synchronous,
    "fts Trainer": fts_trainer,
    "torch.save": hand_written,
    "transformers": transformers_trainer,
    "lightning": lightning,
}


# Figures


def measure(name: str, batch: int, saves: int) -> dict[str, Any]:
    """One run in this process: the step in seconds, and for each save what it cost, in steps."""
    torch.manual_seed(0)
    clock = Clock(2 * saves + 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        CANDIDATES[name](Examples(clock.steps * batch), batch, clock, folder)
        clock.tick()
    wall, processor = ([b - a for a, b in pairwise(times)] for times in (clock.wall, clock.processor))
    plain = [index for index in range(WINDOW, clock.steps) if index // WINDOW % 2 == 0]
    step, work = (statistics.median(times[index] for index in plain) for times in (wall, processor))
    found: dict[str, Any] = {"seconds": step, "waits": [], "total": [], "processor": []}
    for window in range(1, 2 * saves, 2):
        found["waits"].append(wall[window * WINDOW + AT - 1] / step - 1)
        for key, times, unit in (("total", wall, step), ("processor", processor, work)):
            # not the first window of the run, where memory is allocated
            neighbors = [n for n in (window - 1, window + 1) if n > 0]
            usual = statistics.mean(sum(times[n * WINDOW : (n + 1) * WINDOW]) for n in neighbors)
            found[key].append((sum(times[window * WINDOW : (window + 1) * WINDOW]) - usual) / unit)
    return found


def in_own_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = ["--batch", str(options.batch), "--saves", str(options.saves), "--threads", str(options.threads)]
    command = [sys.executable, __file__, "--one", name, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    os.sync()  # pending writes must not count for the next candidate
    return json.loads(done.stdout.splitlines()[-1])


def examples_read_to_resume(count: int, at: int, batch: int = 100) -> int:
    """The number of examples that are read before the first batch, when a run resumes at example `at`."""
    data = Examples(count, width=4)
    batches = loops.source(data, batch_size=batch, shuffle=True).epoch(0, start=at // batch)
    next(iter(batches))
    return data.read - batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, options.batch, options.saves)))
        return
    names = [name for name in options.only if name not in ("transformers", "lightning") or find_spec(name)]
    if absent := set(options.only) - set(names):
        print(f"Skipped, since not installed: {', '.join(sorted(absent))}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for index in range(options.repeats):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(in_own_process(name, options))
    parameters = sum(tensor.numel() for tensor in Mlp().parameters())
    saves = options.repeats * options.saves
    print(f"{parameters:,} parameters, {parameters * 12 / 2**20:.0f} MiB, {saves} saves each, in step times")
    print(f"{'':<18}{'ms per step':>10}{'waits':>8}{'total':>8}{'min':>8}{'max':>8}{'processor':>11}")
    for name in names:
        values = {key: [value for run in found[name] for value in run[key]] for key in ("waits", "total", "processor")}
        middle = {key: statistics.median(those) for key, those in values.items()}
        milliseconds = statistics.median(run["seconds"] for run in found[name]) * 1e3
        extremes = f"{min(values['total']):>8.2f}{max(values['total']):>8.2f}"
        print(
            f"{name:<18}{milliseconds:>10.0f}{middle['waits']:>8.2f}{middle['total']:>8.2f}{extremes}{middle['processor']:>11.2f}"
        )
    print(
        f"resume at example 190,000 of 200,000: examples read before the first batch: {examples_read_to_resume(200_000, 190_000)}"
    )


if __name__ == "__main__":
    main()
