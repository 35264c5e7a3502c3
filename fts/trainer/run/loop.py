"""The events of the core's loop, told to callbacks."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from fts import loops
from fts.distributed.async_reduce import AsyncAllReduceMax
from fts.distributed.deepspeed import whole_parameters
from fts.errors import Interrupted, NonFiniteError
from fts.loops import Counters, Due, EpochBegin, EpochEnd, Logged, Position, RolledBack, Saved, StepBegin, StepEnd
from fts.loops.preemption import StopRequest
from fts.randomness import EVALUATION, fold, seed_generators
from fts.state import TrainState
from fts.trainer import hub
from fts.trainer.arguments.choices import SaveStrategy
from fts.trainer.callbacks import close_bars, export_callbacks
from fts.trainer.checkpoints import saving
from fts.trainer.checkpoints.manager import CheckpointManager, time_left
from fts.trainer.distributed.strategy import verifiers, writer_for
from fts.trainer.evaluation.best_model import checkpoint_of_best, note_best
from fts.trainer.evaluation.loop import EvaluationLeft
from fts.trainer.evaluation.outputs import TrainOutput
from fts.trainer.model.loss import lacks_labels
from fts.trainer.model.preparation import noisy_embeddings, watched
from fts.trainer.model.weights import evaluated_weights, in_train_mode, leave_evaluated, load_best, shares_storage
from fts.trainer.reporting.metrics import speed_metrics
from fts.trainer.run.batch_size import empty_cache
from fts.trainer.run.control import Wanted, agree
from fts.trainer.run.nonfinite import CHOICES, LABELS, Remembered, rolling_back
from fts.trainer.run.preparation import Run
from fts.trainer.run.stepping import Stepping
from fts.trainer.run.token_count import Counting

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)

NOTHING = Due()

TIME_IS_UP = 75
"""The exit status of a run that `max_time` ended: EX_TEMPFAIL of sysexits.h, "try again later"."""

AfterStep: TypeAlias = Callable[[StepEnd, Any], None]
"""What is done after an update and before callbacks hear of it, given the event and the batch."""


def run_training(trainer: Trainer, run: Run, ignore_keys: list[str] | None = None) -> TrainOutput:
    """Fold the loop over the data and tell its events to the callbacks.

    Args:
        trainer: has the callbacks and the control flags.
        run: what to do.
        ignore_keys: the model's outputs that evaluations do not keep.

    Returns:
        The number of updates, the mean loss, and the figures of the run.

    Raises:
        CallbackError: a callback raised; a checkpoint of the last update was written.
        Interrupted: SIGTERM, SIGINT or SIGUSR1 came, or `max_time` is over; the update was finished, and a checkpoint written.
    """
    model, args = trainer.model, trainer.args
    start, first = time.perf_counter(), run.told.global_step
    writer = writer_for(trainer)
    teller = CallbackDispatcher(trainer, run, ignore_keys, start, writer)
    trainer.tell("on_train_begin")
    with (
        closing(run.source),  # its workers would live until Python collects the run
        writer,
        AsyncAllReduceMax(trainer.world) as agree,
        loops.handle_preemption(max_time=time_left(args.max_time, since=trainer.started), agree=agree) as request,
        in_train_mode(model),
        noisy_embeddings(model, args.neftune_noise_alpha),
        watched(model, args.debug),
    ):
        trainer.request = teller.request = request
        try:
            if saving.saves(args):
                export_callbacks(trainer.callback_handler.callbacks)  # an error now rather than at the first checkpoint
            if args.eval_on_start:
                teller.evaluate_first()
            if run.owes:
                teller.make_up(run.state)
            events = rolling_back(args, model, teller.events, run.state, run.start, teller.memory)
            teller.tell_all(writer.watch(loops.with_error_context(events, run.source)))
            if request.code:
                teller.tell_of_stop()
        except BaseException as error:
            close_bars(trainer.callback_handler.callbacks)
            if isinstance(error, NonFiniteError):
                error.add_note(CHOICES)
                if trainer.world.size > 1:
                    error.add_note(f"The rows are those of process {trainer.world.rank}; the cause may be in another's.")
                if lacks_labels(model, teller.stepping.batch, trainer.label_names):
                    error.add_note(LABELS)
            if isinstance(error, Exception):
                teller.rescue(error)
            raise
        finally:
            trainer.request = None
    if request.reason == "max_time" and run.told.global_step < run.plan.total_steps:
        raise Interrupted(TIME_IS_UP, "max_time")
    leave_evaluated(model, teller.stepping.state, run.optimizing.transform)
    told, trained = run.told, run.told.global_step - first
    loss = run.tally.mean_loss(told.global_step)
    metrics = speed_metrics("train", start, run.plan.samples * trained / run.plan.total_steps, trained)
    teller.counting.settle(told)
    metrics |= {"total_flos": told.total_flos, "train_loss": loss} | trainer.memory_figures()
    trainer.log(metrics)
    best = checkpoint_of_best(args, told)
    if best is not None:
        logger.info("Loading the weights of the best evaluation (%s), from %s.", told.best_metric, best)
        with whole_parameters(model.parameters(), write=True):
            load_best(model, str(teller.keeping.here / best), teller.stepping.state, run.optimizing.transform, verifiers(trainer))
    trainer.tell("on_train_end")
    hub.push_last(trainer)
    return TrainOutput(told.global_step, loss, metrics)


class CallbackDispatcher:
    """Tells the events of a run to the callbacks of a trainer, and the loop what these ask for.

    Args:
        trainer: has the callbacks and the control flags.
        run: the run that is followed.
        ignore_keys: the model's outputs that evaluations do not keep.
        start: `time.perf_counter()` when the run began.
        writer: writes the checkpoints.
    """

    def __init__(
        self, trainer: Trainer, run: Run, ignore_keys: list[str] | None, start: float, writer: loops.AsyncCheckpointer
    ) -> None:
        self.trainer = trainer
        self.run = run
        self.told = run.told
        self.tally = run.tally
        self.ignore_keys = ignore_keys
        self.start = start
        self.writer = writer
        callbacks = trainer.callback_handler.callbacks
        self.memory = Remembered(run.told, run.tally, callbacks) if trainer.args.nonfinite == "rollback" else None
        self.counting = Counting.of(trainer)
        self.batches = run.source.batches_per_epoch
        self.accumulate = run.plan.accumulate
        self.total = run.plan.total_steps
        self.stepping = Stepping(trainer, run)
        self.keeping = CheckpointManager(trainer, run, self.stepping, self.counting, writer)
        self.last: StepEnd | None = None
        self.in_place: bool | None = None
        self.request = StopRequest()
        self.window = loops.MetricAccumulator()
        self.leaving = False
        self.differs = False
        self.seed = run.state.seed
        self.after_step: list[AfterStep] = [self._bring_model_up_to_date, *self._asked_for()]

    def _asked_for(self) -> Iterator[AfterStep]:
        args, run = self.trainer.args, self.run
        if self.counting:
            yield lambda event, batch: self.counting.add(batch)
        if run.optimizing.scheduler is not None:
            yield lambda event, batch: run.optimizing.advance(event.state, event.counters.step, event.metrics)
        every = args.torch_empty_cache_steps
        if every:
            yield lambda event, batch: empty_cache(args.device) if event.counters.step % every == 0 else None

    def events(self, state: TrainState, start: Position) -> Iterator[loops.Event]:
        """The events of the loop, from a state and a position on."""
        run, by_steps = self.run, self.trainer.args.max_steps > 0
        self.window = loops.MetricAccumulator(skip_nonfinite=self.trainer.args.logging_nan_inf_filter)
        return loops.fit(
            self.stepping.step,
            state,
            run.drawn,
            total_steps=run.told.global_step if self.trainer.control.should_training_stop else run.plan.total_steps,
            epochs=None if run.source.batches_per_epoch is None or run.cut.offset or by_steps else run.plan.epochs,
            start=start,
            due=self.due,
            evaluate=self.evaluate,
            save=self.keeping.save,
            window=self.window,
        )

    def tell_all(self, events: Iterator[Any]) -> None:
        """Follow the loop to its end. The two branches that run at each step come first, and do no more than they must."""
        trainer, told, request = self.trainer, self.told, self.request
        listeners = trainer.callback_handler.listeners
        batches, accumulate = self.batches, self.accumulate
        stepping = self.stepping
        guests = bool(trainer.world.sum(torch.tensor(int(stepping.has_guests()))))  # a callback may be one process's alone
        stepping.watch(guests)
        self.differs = guests and trainer.world.size > 1
        for event in events:
            kind = type(event)
            if kind is StepBegin:
                control = trainer.control
                control.should_log = control.should_evaluate = control.should_save = False
                stepping.batch, stepping.state = event.batch, event.state
                if listeners["on_step_begin"]:
                    trainer.tell("on_step_begin")
                stepping.begin(event)
            elif kind is StepEnd:
                self.last = event
                stepping.end(event)
                for act in self.after_step:
                    act(event, stepping.batch)
                counters = event.counters
                told.global_step = counters.step
                if batches:
                    told.epoch = counters.epoch + min(counters.batch * accumulate, batches) / batches
                else:
                    told.epoch = counters.epoch + counters.batch / self.total
                trainer.tell("on_step_end", metrics=event.metrics)
                if self.keeping.is_due():
                    trainer.control.should_save = True
                if self.writer.failed:
                    request.ask()  # the last save, which all come to, raises it in all
                if request.poll():
                    self._leave(owes=trainer.control.should_evaluate)
            else:
                self._tell_other(kind, event)

    def due(self, counters: Counters) -> Due:
        """What the control flags ask for now."""
        self.agree()
        control = self.trainer.control
        if control.should_log and self.tally.read_at == counters.step:
            self._log()  # the loop has no new figures, because they were read for a checkpoint
        over = counters.moment in ("end", "stop")
        if over and self.last is not None:
            if self.request.poll():
                self._leave(owes=self.keeping.owes)
            control.should_save = self.keeping.lacks(counters.step, asked=self.leaving or control.should_save)
        read = over or (self.memory is not None and self.memory.reads_at(counters.step))
        asked = control.should_log or control.should_evaluate or control.should_save
        if read or asked or control.should_training_stop or control.should_epoch_stop:
            return cast(Due, Wanted(self.trainer, read, self.agree))
        return NOTHING

    def agree(self) -> None:
        """Make the control flags those of all processes, where the user's callbacks could make them differ."""
        if self.differs:
            agree(self.trainer, self.trainer.world)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Evaluate the model, which has the state's weights, and note whether it is the best so far."""
        trainer, optimizing = self.trainer, self.run.optimizing
        trainer.control.should_evaluate = False
        self.keeping.owes = True  # until it is done: also for a checkpoint after an error in it
        try:
            with evaluated_weights(trainer.model, state, optimizing.transform):
                metrics = self.run_evaluation()
        except EvaluationLeft:
            self._leave(owes=True)
            return {}
        if optimizing.needs_metric:
            optimizing.observe(trainer.args, state, metrics)
        is_best = note_best(trainer.args, self.told, metrics)
        if trainer.args.save_strategy == SaveStrategy.BEST:
            trainer.control.should_save = is_best
        self.keeping.owes = False
        if self.request.poll():
            self._leave(owes=False)
        return metrics

    def _leave(self, *, owes: bool) -> None:
        """Save and stop here, as the run is asked to; with `owes` the evaluation of this step is left to whoever resumes."""
        control = self.trainer.control
        self.leaving, self.keeping.owes = True, owes
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False  # who asks a run to stop does not want to wait

    def evaluate_first(self) -> None:
        """Evaluate before the first update."""
        try:
            self.run_evaluation()
        except EvaluationLeft:
            self.trainer.control.should_training_stop = True

    def tell_of_stop(self) -> None:
        """Say what a run that was asked to stop leaves."""
        close_bars(self.trainer.callback_handler.callbacks)
        saved = self.keeping.path_of(self.told.global_step) if self.keeping.saved == self.told.global_step else None
        left = "nothing was saved" if saved is None else f"{saved} is written: train(resume_from_checkpoint=True) goes on"
        logger.warning("Stopped by %s after step %s; %s.", self.request.reason, self.told.global_step, left)

    def rescue(self, error: Exception) -> None:
        """Write a checkpoint of the last update after an error, with the figures that the loop has not read."""
        if self.last is None:
            return
        means, last, steps = self.window.read()
        if steps:
            event = Logged(self.last.counters, means, last, steps)
            self.tally.add(event, skip_nonfinite=self.trainer.args.logging_nan_inf_filter)
        self.keeping.rescue(error, self.last)

    def make_up(self, state: TrainState) -> None:
        """Do what was due at the last step of an interrupted run, and that run had no time for: evaluate, and save with that."""
        self.run.optimizing.latest.state = state
        history, step = self.told.log_history, self.told.global_step  # which may have it, where a callback failed after it
        history[:] = [entry for entry in history if entry.get("step") != step or not any(map(_of_evaluation, entry))]
        self.evaluate(state)
        self.keeping.save(state, self.run.start)
        self.trainer.tell("on_save")

    def run_evaluation(self) -> dict[str, float]:
        """What the trainer's `evaluate` gives, which a subclass may have replaced; what it draws depends on the step alone."""
        trainer, step = self.trainer, self.told.global_step
        seed_generators(fold(self.seed, EVALUATION, step), trainer.args.device)
        metrics = trainer.evaluate() if self.ignore_keys is None else trainer.evaluate(ignore_keys=self.ignore_keys)
        if trainer._on_evaluated is not None and trainer._on_evaluated(metrics, step):
            trainer.control.should_training_stop = True
        return metrics

    def _tell_other(self, kind: type[Any], event: Any) -> None:
        trainer = self.trainer
        if kind is Logged:
            self.tally.add(event, skip_nonfinite=trainer.args.logging_nan_inf_filter)
            if trainer.control.should_log:
                self._log()
        elif kind is Saved:
            if any(getattr(listener, "reads_checkpoints", True) for listener in trainer.callback_handler.listeners["on_save"]):
                # a callback finds the checkpoint in its place; an error is raised where all processes hear of it
                (self.writer.wait if trainer.world.size == 1 else self.writer.join)()
            trainer.tell("on_save")
        elif kind is RolledBack and self.memory is not None:
            self.memory.go_back(event)
            self.counting.forget()
            self.last = None  # its state is one that the run took back
        elif kind is EpochBegin:
            trainer.control.should_epoch_stop = False
            trainer.tell("on_epoch_begin")
        elif kind is EpochEnd and not self.leaving:  # else it is told when the run goes on and comes to it
            trainer.tell("on_epoch_end")

    def _bring_model_up_to_date(self, event: StepEnd, batch: Any) -> None:
        # The usual optimizers write the model's own tensors; one that makes new ones is found out at the first step.
        if self.in_place:
            return
        self.in_place = self.in_place is None and shares_storage(event.state, self.trainer.model)
        if not self.in_place:
            event.state.apply_to(self.trainer.model)

    def _log(self) -> None:
        self.trainer.control.should_log = False
        if self.tally.steps:
            self.counting.settle(self.told)
            self._report(self.tally.take())

    def _report(self, logs: dict[str, float]) -> None:
        # many a script's `log` takes the figures alone
        if len(inspect.signature(self.trainer.log).parameters) > 1:
            self.trainer.log(logs, self.start)
        else:
            self.trainer.log(logs)


def _of_evaluation(name: str) -> bool:
    return name.startswith("eval_")
