"""The checkpoints of a run: when they are due by the clock, what is in them, and the one that an error leaves."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from fts import loops
from fts.distributed.async_reduce import AsyncAllReduceMax
from fts.distributed.deepspeed import is_partitioned
from fts.dtensors import any_sharded
from fts.errors import CallbackError, CheckpointError
from fts.loops import Position, StepEnd
from fts.loops.durations import seconds_of
from fts.loops.validation import is_whole
from fts.state import TrainState, is_donated
from fts.trainer import hub
from fts.trainer.arguments.choices import SaveStrategy
from fts.trainer.callbacks import states_to_save
from fts.trainer.checkpoints import saving
from fts.trainer.model.weights import evaluated_weights
from fts.trainer.optimization.torch_settings import settings_state
from fts.trainer.run.batch_size import is_out_of_memory
from fts.trainer.run.overrides import overridden
from fts.trainer.run.preparation import Run
from fts.trainer.run.stepping import Stepping
from fts.trainer.run.token_count import Counting

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer


class CheckpointManager:
    """Writes the checkpoints of a run.

    Args:
        trainer: has the arguments, the model and the callbacks.
        run: the run that is kept.
        stepping: knows what callbacks wrote into the optimizer's groups.
        counting: counts tokens and operations.
        writer: writes.

    Attributes:
        owes: whether an evaluation was due at this step, and is not done: the run was asked to stop, or it failed.
        here: the directory that relative paths are of, also where the program goes to another one.
    """

    def __init__(
        self, trainer: Trainer, run: Run, stepping: Stepping, counting: Counting, writer: loops.AsyncCheckpointer
    ) -> None:
        self.trainer = trainer
        self.run = run
        self.stepping = stepping
        self.counting = counting
        self.writer = writer
        every = trainer.args.save_every
        self.timer = None if every is None else loops.every_interval(every, agree=AsyncAllReduceMax(trainer.world))
        self.owes = False
        self.here = Path.cwd()
        self.saved: int | None = None

    def is_due(self) -> bool:
        """Whether a checkpoint is due by the clock."""
        return self.timer is not None and self.timer.due()

    def save(self, state: TrainState, position: Position, *, alone: bool = False) -> Path:
        """Begin to write a checkpoint; those that are outdated are deleted when it is complete.

        Args:
            state: of the last update.
            position: where in the data to go on.
            alone: whether the other processes do not do so at the same time; then it is complete at the end.
        """
        trainer, run, told = self.trainer, self.run, self.run.told
        writer = loops.AsyncCheckpointer(background=False) if alone else self.writer
        trainer.control.should_save = False
        if self.timer is not None:
            self.timer.reset()
        if not alone:  # it adds up what all have counted
            self.counting.settle(told)
        told.stateful_callbacks = states_to_save([*trainer.callback_handler.callbacks, trainer.control])
        self.saved = told.global_step
        given = self.path_of(told.global_step)
        path = self.here / given
        root = path.parent
        if told.best_global_step == told.global_step:
            told.best_model_checkpoint = str(given)
        limit, best = trainer.args.save_total_limit, told.best_model_checkpoint
        rotate = partial(loops.rotate_checkpoints, root, limit, best, latest=path)
        extra: dict[str, Any] = {"tally": run.tally.to_dict(), "cut": attrs.asdict(run.cut)}
        if run.optimizing.steps:
            extra["torch"] = settings_state(run.optimizing.optimizer, run.optimizing.scheduler, run.optimizing.before)
        extra |= {"written": self.stepping.written(), "data": run.source.cursor(position), "owes": self.owes}
        # a model alone is for evaluation; a run goes on from the weights that are trained
        only_model = trainer.args.save_only_model or run.optimizing.engine is not None
        with evaluated_weights(trainer.model, state, run.optimizing.transform) if only_model else nullcontext():
            return saving.save_checkpoint(
                writer,
                root,
                state,
                position,
                model=trainer.model,
                processing_class=trainer.processing_class,
                args=trainer.args,
                trainer_state=told,
                extra=extra,
                only_model=only_model,
                own_save=partial(hub.save_without_push, trainer) if overridden(trainer, "save_model") else None,
                then=hub.after_save(trainer, writer, path, rotate),
            )

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of a step is, as the arguments have it."""
        return Path(str(self.trainer.args.output_dir)) / f"checkpoint-{step}"

    @property
    def saves(self) -> bool:
        """Whether the run saves at all, and not the best evaluations alone."""
        by_itself = self.trainer.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH)
        return by_itself or self.timer is not None

    def lacks(self, step: int, *, asked: bool) -> bool:
        """Whether the last step of a run is still to be saved: where one is asked for, or the run saves at all.

        Args:
            step: the last one.
            asked: whether a checkpoint of it is asked for.
        """
        return self.saved != step and (asked or self.saves)

    def rescue(self, error: Exception, last: StepEnd | None) -> None:
        """Write a checkpoint of the last update, after a callback failed, the data or a step; the error says where.

        There is none where the failing step had begun to write the state, and after other errors than a callback's none where
        nothing was to be saved at all, or the batch size is to be tried again.

        Args:
            error: gets the note.
            last: what is known of the last update; None if there was none.
        """
        args = self.trainer.args
        tried = args.auto_find_batch_size and is_out_of_memory(error)
        if last is None or is_donated(last.state) or isinstance(error, CheckpointError):
            return
        if not isinstance(error, CallbackError) and (tried or not saving.saves(args)):
            return
        counters, several = last.counters, self.trainer.world.size > 1
        if several and (any_sharded(last.state.params.values()) or is_partitioned(self.trainer.model)):
            error.add_note(
                f"No checkpoint of step {counters.step} could be written: the other processes, which have the other parts of the "
                "state, may be elsewhere. train(resume_from_checkpoint=True) goes on from the one before."
            )
            return
        if not self.writer.writes:
            return
        self.run.told.global_step = counters.step
        path = self.path_of(counters.step)
        try:
            self.writer.wait()
            if self.saved != counters.step or self.owes or not is_whole(self.here / path):
                self.save(last.state, counters.position, alone=several)
                self.writer.wait()
        except Exception as second:  # noqa: BLE001 - the first one is what has to be told
            error.add_note(f"No checkpoint of step {counters.step} could be written: {type(second).__name__}: {second}")
            return
        error.add_note(f"A checkpoint of step {counters.step} was written: train(resume_from_checkpoint={str(path)!r}) goes on.")


def time_left(limit: float | str | None, *, since: float) -> float | None:
    """What is left of a limit, in seconds; None for no limit.

    Args:
        limit: as `loops.durations.seconds_of` reads it.
        since: when it began, on the clock of `time.monotonic`.

    >>> time_left("1h", since=time.monotonic()) <= 3600.0
    True
    """
    return None if limit is None else max(0.0, seconds_of(limit) - (time.monotonic() - since))
