"""The checkpoints of a run: when the clock makes one due, what is in them, and the one that an error leaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import attrs
from torch import nn

from fts import loops
from fts.distributed import Group
from fts.distributed.async_reduce import AsyncAllReduceMax
from fts.distributed.deepspeed import is_partitioned
from fts.dtensors import any_dtensor
from fts.errors import CallbackError, CheckpointError
from fts.loops import Position, Source, StepEnd
from fts.loops.checkpoint_status import is_complete
from fts.loops.durations import parse_duration
from fts.state import TrainState, is_donated
from fts.trainer.arguments import SaveStrategy, TrainingArguments
from fts.trainer.callbacks import TrainerState
from fts.trainer.checkpoints.checkpoint_files import CheckpointContents, save_checkpoint, saves_checkpoints
from fts.trainer.checkpoints.epoch_layout import EpochLayout
from fts.trainer.model import swap_eval_params
from fts.trainer.optimization import RunOptimizer, torch_state_dict
from fts.trainer.reporting import RunningMetrics

AfterSave = Callable[[loops.AsyncCheckpointer, Path, Callable[[], object]], Callable[[], object]]
"""`(writer, path, rotate)` -> what to call when the checkpoint is durable; it calls `rotate`, which deletes outdated ones."""


class CheckpointedRun(Protocol):
    """What a checkpoint records of a run."""

    @property
    def optimizer(self) -> RunOptimizer:
        """What updates the weights."""

    @property
    def source(self) -> Source:
        """The batches."""

    @property
    def epoch_layout(self) -> EpochLayout:
        """How the examples of an epoch are split into updates."""

    @property
    def trainer_state(self) -> TrainerState:
        """The state that callbacks get."""

    @property
    def running_metrics(self) -> RunningMetrics:
        """Metrics that are not logged yet."""


@attrs.frozen(eq=False)
class CheckpointHooks:
    """What the manager calls.

    Attributes:
        callback_states: clears `control.should_save`, and returns the states of callbacks and control flags.
        sync_counts: adds up over all ranks what each has counted, and writes it to the trainer state.
        optimizer_changes: returns what callbacks wrote into the optimizer's groups.
        save_model: the user's `save_model`, which writes the model to a directory; None for the default.
        after_save: makes what is called when a checkpoint is durable.
    """

    callback_states: Callable[[], dict[str, Any]]
    sync_counts: Callable[[], None]
    optimizer_changes: Callable[[], dict[str, Any]]
    save_model: Callable[[str], Any] | None
    after_save: AfterSave


class CheckpointManager:
    """Writes the checkpoints of a run.

    Args:
        run: the run.
        hooks: what it calls.
        writer: writes the files.
        args: when to save, and where.
        model: what the weights belong to.
        processing_class: is saved with the model.
        world: all ranks.

    Attributes:
        evaluation_pending: whether an evaluation is due at this step and is not done: the run was asked to stop, or it failed.
        directory: what relative paths start from, also after the program changed its working directory.
        saved_step: the step of the last checkpoint; None before the first.
    """

    def __init__(
        self,
        run: CheckpointedRun,
        hooks: CheckpointHooks,
        writer: loops.AsyncCheckpointer,
        *,
        args: TrainingArguments,
        model: nn.Module,
        processing_class: Any,
        world: Group,
    ) -> None:
        self.run = run
        self.hooks = hooks
        self.writer = writer
        self.args = args
        self.model = model
        self.processing_class = processing_class
        self.world = world
        self.timer = None if args.save_every is None else loops.every_interval(args.save_every, agree=AsyncAllReduceMax(world))
        self.evaluation_pending = False
        self.directory = Path.cwd()
        self.saved_step: int | None = None

    def is_due(self) -> bool:
        """Whether a checkpoint is due by the clock."""
        return self.timer is not None and self.timer.due()

    def save(self, state: TrainState, position: Position, *, alone: bool = False) -> Path:
        """Begin to write a checkpoint; outdated ones are deleted when it is complete.

        Args:
            state: of the last update.
            position: where in the data to resume.
            alone: whether the other ranks do not save at the same time; then the checkpoint is complete on return.
        """
        run, trainer_state = self.run, self.run.trainer_state
        writer = loops.AsyncCheckpointer(background=False) if alone else self.writer
        if self.timer is not None:
            self.timer.reset()
        if not alone:  # it is a collective
            self.hooks.sync_counts()
        trainer_state.stateful_callbacks = self.hooks.callback_states()
        self.saved_step = trainer_state.global_step
        given = self.path_of(trainer_state.global_step)
        path = self.directory / given
        if trainer_state.best_global_step == trainer_state.global_step:
            trainer_state.best_model_checkpoint = str(given)
        limit, best = self.args.save_total_limit, trainer_state.best_model_checkpoint
        rotate = partial(loops.rotate_checkpoints, path.parent, limit, best, latest=path)
        extra = self._extra(position)
        # a model alone is for evaluation; a run resumes from the weights that are trained
        only_model = self.args.save_only_model or run.optimizer.engine is not None
        with swap_eval_params(self.model, state, run.optimizer.transform) if only_model else nullcontext():
            contents = CheckpointContents(
                state,
                position,
                trainer_state,
                self.model,
                self.args,
                self.processing_class,
                extra=extra,
                only_model=only_model,
                save_model=self.hooks.save_model,
            )
            return save_checkpoint(writer, path.parent, contents, self.hooks.after_save(writer, path, rotate))

    def _extra(self, position: Position) -> dict[str, Any]:
        """What else resuming needs, as JSON values."""
        run = self.run
        extra: dict[str, Any] = {"tally": run.running_metrics.to_dict(), "cut": attrs.asdict(run.epoch_layout)}
        if run.optimizer.steps_scheduler:
            extra["torch"] = torch_state_dict(run.optimizer.optimizer, run.optimizer.scheduler, run.optimizer.initial_settings)
        extra |= {"written": self.hooks.optimizer_changes(), "data": run.source.state_dict(position)}
        return extra | {"owes": self.evaluation_pending}

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, as the arguments have it."""
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}"

    @property
    def saves(self) -> bool:
        """Whether the run saves at all, and not the best evaluations alone."""
        by_strategy = self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH)
        return by_strategy or self.timer is not None

    def needs_final_save(self, step: int, *, asked: bool) -> bool:
        """Whether the last step of a run is still to be saved: where a checkpoint is asked for, or the run saves at all.

        Args:
            step: the last one.
            asked: whether a checkpoint of it is asked for.
        """
        return self.saved_step != step and (asked or self.saves)

    def save_on_error(self, error: Exception, last: StepEnd | None, *, will_retry: bool = False) -> None:
        """Write a checkpoint of the last update, after a callback failed, the data or a step; the error's note says where.

        There is none where the failing step had begun to write the state. After other errors than a callback's there is none
        where nothing was to be saved at all, or where the run is tried again with another batch size.

        Args:
            error: gets the note.
            last: what is known of the last update; None if there was none.
            will_retry: whether the run is tried again.
        """
        if last is None or is_donated(last.state) or isinstance(error, CheckpointError):
            return
        if not isinstance(error, CallbackError) and (will_retry or not saves_checkpoints(self.args)):
            return
        counters, several = last.counters, self.world.size > 1
        if several and (any_dtensor(last.state.params.values()) or is_partitioned(self.model)):
            error.add_note(
                f"No checkpoint of step {counters.step} could be written: the other processes, which have the other shards of "
                "the state, may be elsewhere. train(resume_from_checkpoint=True) resumes from the one before."
            )
            return
        if not self.writer.is_writer:
            return
        self.run.trainer_state.global_step = counters.step
        path = self.path_of(counters.step)
        try:
            self.writer.wait()
            if self.saved_step != counters.step or self.evaluation_pending or not is_complete(self.directory / path):
                self.save(last.state, counters.position, alone=several)
                self.writer.wait()
        except Exception as second:  # noqa: BLE001 - the first one is what has to be reported
            error.add_note(f"No checkpoint of step {counters.step} could be written: {type(second).__name__}: {second}")
            return
        error.add_note(
            f"A checkpoint of step {counters.step} was written: train(resume_from_checkpoint={str(path)!r}) resumes it."
        )


def remaining_time(limit: float | str | None, *, since: float) -> float | None:
    """What is left of a limit, in seconds; None for no limit.

    Args:
        limit: as `loops.durations.parse_duration` reads it.
        since: when it began, on the clock of `time.monotonic`.

    >>> remaining_time("1h", since=time.monotonic()) <= 3600.0
    True
    """
    return None if limit is None else max(0.0, parse_duration(limit) - (time.monotonic() - since))
