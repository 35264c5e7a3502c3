"""The events of the core's loop, told to callbacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fts import loops
from fts.loops import Counters, Due, EpochBegin, EpochEnd, Logged, Position, Saved, StepBegin, StepEnd
from fts.state import TrainState
from fts.steps import MicroBatches
from fts.trainer import saving
from fts.trainer.best import note_best
from fts.trainer.callbacks import export_callbacks
from fts.trainer.choices import SaveStrategy
from fts.trainer.evaluation import TrainOutput, speed_metrics
from fts.trainer.training import Run, save_run

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

NOTHING = Due()


def follow(trainer: Trainer, run: Run) -> TrainOutput:
    """Fold the loop over the data and tell its events to the callbacks.

    Returns:
        The number of updates, the mean loss, and the figures of the run.
    """
    start, first = time.perf_counter(), run.told.global_step
    teller = Teller(trainer, run)
    trainer.tell("on_train_begin")
    with in_train_mode(trainer.model):
        teller.tell_all(
            loops.fit(
                run.step,
                run.state,
                run.source,
                total_steps=run.plan.total_steps,
                start=run.start,
                due=teller.due,
                evaluate=teller.evaluate,
                save=teller.save,
            )
        )
    told, trained = run.told, run.told.global_step - first
    loss = run.tally.total_loss / max(told.global_step, 1)
    metrics = speed_metrics("train", start, run.plan.samples * trained / run.plan.total_steps, trained)
    metrics |= {"total_flos": told.total_flos, "train_loss": loss}
    trainer.log(metrics)
    if trainer.args.load_best_model_at_end and told.best_model_checkpoint is not None:
        logger.info("Loading the weights of the best evaluation (%s), from %s.", told.best_metric, told.best_model_checkpoint)
        saving.load_weights(trainer.model, told.best_model_checkpoint)
    trainer.tell("on_train_end")
    return TrainOutput(told.global_step, loss, metrics)


class Teller:
    """Tells the events of a run to the callbacks of a trainer, and the loop what these ask for.

    Args:
        trainer: has the callbacks and the control flags.
        run: the run that is followed.
    """

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self.trainer = trainer
        self.run = run
        self.told = run.told
        self.tally = run.tally
        self.in_place: bool | None = None
        self.batches = run.source.batches_per_epoch
        self.accumulate = run.plan.accumulate
        self.total = run.plan.total_steps

    def tell_all(self, events: Iterator[Any]) -> None:
        """Follow the loop to its end. The two branches that run at each step come first, and do no more than they must."""
        trainer, told = self.trainer, self.told
        listeners = trainer.callback_handler.listeners
        batches, accumulate = self.batches, self.accumulate
        batch: Any = None
        for event in events:
            kind = type(event)
            if kind is StepBegin:
                control = trainer.control
                control.should_log = control.should_evaluate = control.should_save = False
                batch = event.batch
                if listeners["on_step_begin"]:
                    trainer.tell("on_step_begin")
            elif kind is StepEnd:
                if not self.in_place:
                    self._bring_model_up_to(event.state)
                if listeners["on_substep_end"] or listeners["on_pre_optimizer_step"] or listeners["on_optimizer_step"]:
                    self._tell_inner(batch)
                counters = event.counters
                told.global_step = counters.step
                if batches:
                    told.epoch = counters.epoch + min(counters.batch * accumulate, batches) / batches
                else:
                    told.epoch = counters.step / self.total
                trainer.tell("on_step_end")
            else:
                self._tell_other(kind, event)

    def due(self, counters: Counters) -> Due:
        """What the control flags ask for now."""
        control = self.trainer.control
        if control.should_log and self.tally.read_at == counters.step:
            self._log()  # the loop has no new figures, because they were read for a checkpoint
        over = counters.moment in ("end", "stop")
        asked = control.should_log or control.should_evaluate or control.should_save
        if over or asked or control.should_training_stop or control.should_epoch_stop:
            return cast(Due, Wanted(self.trainer, over))
        return NOTHING

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Evaluate the model, which has the state's weights, and note whether it is the best so far."""
        trainer = self.trainer
        trainer.control.should_evaluate = False
        metrics = trainer.evaluate()
        is_best = note_best(trainer.args, self.told, metrics)
        if trainer.args.save_strategy == SaveStrategy.BEST:
            trainer.control.should_save = is_best
        return metrics

    def save(self, state: TrainState, position: Position) -> Path:
        """Write a checkpoint."""
        self.trainer.control.should_save = False
        self.told.stateful_callbacks = export_callbacks(self.trainer.callback_handler.callbacks)
        return save_run(self.trainer, self.run, state, position)

    def _tell_other(self, kind: type[Any], event: Any) -> None:
        trainer = self.trainer
        if kind is Logged:
            self.tally.add(event)
            if trainer.control.should_log:
                self._log()
        elif kind is Saved:
            trainer.tell("on_save")
        elif kind is EpochBegin:
            trainer.control.should_epoch_stop = False
            trainer.tell("on_epoch_begin")
        elif kind is EpochEnd:
            trainer.tell("on_epoch_end")

    def _tell_inner(self, batch: Any) -> None:
        for _ in range(len(batch) - 1 if isinstance(batch, MicroBatches) else 0):
            self.trainer.tell("on_substep_end")
        self.trainer.tell("on_pre_optimizer_step")
        self.trainer.tell("on_optimizer_step")

    def _bring_model_up_to(self, state: TrainState) -> None:
        # The usual optimizers write the model's own tensors; one that makes new ones is found out at the first step.
        self.in_place = self.in_place is None and shares_storage(state, self.trainer.model)
        if not self.in_place:
            state.apply_to(self.trainer.model)

    def _log(self) -> None:
        self.trainer.control.should_log = False
        if self.tally.steps:
            self.trainer.log(self.tally.take())


class Wanted:
    """What is due, read from the control flags at the moment when the loop asks for it.

    The loop asks in its order (log, evaluate, save, stop), and callbacks may change a flag in between: an evaluation that
    stops early, or one whose metric asks for a checkpoint.

    Args:
        trainer: has the flags.
        over: whether the run is over.
    """

    def __init__(self, trainer: Trainer, over: bool) -> None:
        self.trainer = trainer
        self.over = over

    @property
    def log(self) -> bool:
        """Read the loop's figures: to log them, or before anything that may save, or at the end for the mean loss."""
        control = self.trainer.control
        return self.over or control.should_log or control.should_evaluate or control.should_save

    @property
    def evaluate(self) -> bool:
        """Evaluate."""
        return self.trainer.control.should_evaluate

    @property
    def save(self) -> bool:
        """Write a checkpoint."""
        return self.trainer.control.should_save

    @property
    def stop(self) -> bool:
        """End the run."""
        return self.trainer.control.should_training_stop

    @property
    def end_epoch(self) -> bool:
        """End the epoch."""
        return self.trainer.control.should_epoch_stop


def shares_storage(state: TrainState, model: nn.Module) -> bool:
    """Whether a state's tensors are those of the model, so that writing one writes the other."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    return all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in (state.params | state.buffers).items())


@contextmanager
def in_train_mode(model: nn.Module) -> Iterator[None]:
    """Every module in train mode until the block ends, then each as it was."""
    modes = [(child, child.training) for child in model.modules()]
    model.train()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
