"""One update, one evaluated batch and one checkpoint, tried before long work."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch

from fts import loops
from fts.loops import Position
from fts.loops.sampling import IsolatedGenerators
from fts.state import TrainState
from fts.trainer.callbacks.state import TrainerState
from fts.trainer.checkpoints import saving
from fts.trainer.data.sampling import data_seed
from fts.trainer.reporting.memory import MemoryMeter

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

T = TypeVar("T")


@attrs.frozen
class DryRun:
    """What a run will need.

    Attributes:
        total_steps: how many updates it has.
        loss: that of the first batch.
        step_seconds: of one update, after one that warmed up.
        step_bytes: memory that an update adds at its peak, on the accelerator or in the process.
        evaluation_seconds: of one batch of evaluation; None without evaluation data.
        checkpoint_seconds: of one checkpoint, with its checksums.
        checkpoint_bytes: on the disk.
    """

    total_steps: int
    loss: float
    step_seconds: float
    step_bytes: int
    evaluation_seconds: float | None
    checkpoint_seconds: float
    checkpoint_bytes: int

    def __str__(self) -> str:
        hours = self.total_steps * self.step_seconds / 3600
        evaluation = "none" if self.evaluation_seconds is None else f"{self.evaluation_seconds:.3g} s a batch"
        lines = {
            "updates": f"{self.total_steps}, {self.step_seconds:.3g} s each: {hours:.2g} h without evaluations and checkpoints",
            "memory of an update": f"{self.step_bytes / 2**20:.0f} MiB",
            "first loss": f"{self.loss:.4g}",
            "evaluation": evaluation,
            "checkpoint": f"{self.checkpoint_seconds:.3g} s, {self.checkpoint_bytes / 2**20:.0f} MiB",
        }
        return "\n".join(f"{name:<20} {text}" for name, text in lines.items())


def dry_run(trainer: Trainer) -> DryRun:
    """Try what a run is made of, and leave everything as it was.

    Args:
        trainer: its model, optimizer, random numbers, callbacks and files are not changed.
    """
    args, model = trainer.args, trainer.model
    with IsolatedGenerators(args.seed), _untouched(trainer), tempfile.TemporaryDirectory() as directory:
        source = trainer.train_source(data_seed(args))
        plan = trainer.plan()
        chosen = trainer.optimizing(plan)
        step = trainer.step_of(plan, chosen)
        state = TrainState.create(model, chosen.transform, seed=args.seed)
        with closing(source):
            batch = next(source.epoch(0))
        (state, metrics), _, _ = _measured(lambda: step(state, batch))
        (state, _), seconds, memory = _measured(lambda: step(state, batch))
        evaluated = None
        if trainer.eval_dataset is not None:
            dataset = trainer.eval_dataset
            name = next(iter(dataset)) if isinstance(dataset, dict) else None
            batches = list(itertools.islice(trainer.get_eval_dataloader(name), 1))
            evaluated = _measured(lambda: trainer.evaluation_loop(batches, "Evaluation"))[1]
        path, saving_seconds, _ = _measured(
            lambda: saving.save_checkpoint(
                loops.AsyncCheckpointer(background=False),
                directory,
                state,
                Position(),
                model=model,
                processing_class=trainer.processing_class,
                args=args,
                trainer_state=TrainerState(),
                extra={},
            )
        )
        size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    return DryRun(plan.total_steps, float(metrics["loss"]), seconds, memory, evaluated, saving_seconds, size)


def _measured(work: Callable[[], T]) -> tuple[T, float, int]:
    with MemoryMeter(True).measuring("train") as figures:
        start = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        found = figures()
    kind = "gpu" if "train_mem_gpu_alloc_delta" in found else "cpu"
    delta, peak = (found.get(f"train_mem_{kind}_{name}_delta", 0) for name in ("alloc", "peaked"))
    return result, seconds, max(0, delta) + peak


@contextmanager
def _untouched(trainer: Trainer) -> Iterator[None]:
    kept: dict[str, Any] = {name: getattr(trainer, name) for name in ("optimizer", "lr_scheduler", "state", "control")}
    callbacks, trainer.callback_handler.callbacks = trainer.callback_handler.callbacks, []
    tensors = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    modes = [(child, child.training) for child in trainer.model.modules()]
    try:
        yield
    finally:
        trainer.model.load_state_dict(tensors)
        for child, training in modes:
            child.training = training
        trainer.callback_handler.callbacks = callbacks
        for name, value in kept.items():
            setattr(trainer, name, value)
