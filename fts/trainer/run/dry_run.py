"""A dry run: one update, one evaluated batch and one checkpoint."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch

from fts import loops
from fts.loops import Position
from fts.loops.sampling import IsolatedGenerators
from fts.state import TrainState
from fts.trainer.arguments import Plan
from fts.trainer.callbacks import TrainerState
from fts.trainer.checkpoints import CheckpointContents, save_checkpoint
from fts.trainer.data import data_seed
from fts.trainer.reporting import TrainerMemoryTracker
from fts.trainer.run.context import RunContext

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


def dry_run(
    context: RunContext,
    make_plan: Callable[[], Plan],
    eval_dataloader: Callable[[], Iterable[Any]] | None,
    evaluation_loop: Callable[[list[Any], str], Any],
) -> DryRun:
    """Try the parts of a run, and restore everything as it was.

    Args:
        context: what the run is given. Its model, optimizer, random numbers, callbacks and files are not changed.
        make_plan: makes the plan.
        eval_dataloader: makes the batches of an evaluation; None where there is no evaluation.
        evaluation_loop: evaluates batches, given a description.
    """
    args, model, hooks = context.args, context.model, context.hooks
    with IsolatedGenerators(args.seed), _restored_after(context), tempfile.TemporaryDirectory() as directory:
        source = hooks.train_source(data_seed(args))
        plan = make_plan()
        optimizer = hooks.make_optimizer(plan)
        step = hooks.make_step(plan, optimizer)
        state = TrainState.create(model, optimizer.transform, seed=args.seed)
        with closing(source):
            batch = next(source.epoch(0))
        (state, metrics), _, _ = _measured(lambda: step(state, batch))
        (state, _), seconds, memory = _measured(lambda: step(state, batch))
        evaluation_seconds = None
        if eval_dataloader is not None:
            batches = list(itertools.islice(eval_dataloader(), 1))
            evaluation_seconds = _measured(lambda: evaluation_loop(batches, "Evaluation"))[1]
        contents = CheckpointContents(
            state, Position(), TrainerState(), model, args, context.processing_class, only_model=args.save_only_model
        )
        path, saving_seconds, _ = _measured(
            lambda: save_checkpoint(loops.AsyncCheckpointer(background=False), directory, contents)
        )
        size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    return DryRun(plan.total_steps, float(metrics["loss"]), seconds, memory, evaluation_seconds, saving_seconds, size)


def _measured(work: Callable[[], T]) -> tuple[T, float, int]:
    with TrainerMemoryTracker(True).measuring("train") as memory_metrics:
        start = time.perf_counter()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        metrics = memory_metrics()
    kind = "gpu" if "train_mem_gpu_alloc_delta" in metrics else "cpu"
    delta, peak = (metrics.get(f"train_mem_{kind}_{name}_delta", 0) for name in ("alloc", "peaked"))
    return result, seconds, max(0, delta) + peak


@contextmanager
def _restored_after(context: RunContext) -> Iterator[None]:
    trainer, model, handler = context.trainer, context.model, context.callback_handler
    attributes: dict[str, Any] = {name: getattr(trainer, name) for name in ("optimizer", "lr_scheduler", "state", "control")}
    callbacks, handler.callbacks = handler.callbacks, []
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    modes = [(child, child.training) for child in model.modules()]
    try:
        yield
    finally:
        model.load_state_dict(tensors)
        for child, training in modes:
            child.training = training
        handler.callbacks = callbacks
        for name, value in attributes.items():
            setattr(trainer, name, value)
