"""The events of the core's loop, dispatched to callbacks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast

import torch

from fts import loops
from fts.loops import Counters, Due, EpochBegin, EpochEnd, Logged, Position, RolledBack, Saved, StepBegin, StepEnd
from fts.loops.preemption import StopRequest
from fts.randomness import EVALUATION, fold_in, seed_generators
from fts.state import TrainState
from fts.trainer.arguments import SaveStrategy
from fts.trainer.callbacks import close_bars, states_to_save
from fts.trainer.checkpoints import CheckpointHooks, CheckpointManager
from fts.trainer.evaluation import EvaluationInterrupted, metric_for_best_model, update_best_metric
from fts.trainer.model import shares_storage, swap_eval_params
from fts.trainer.run.batch_size import empty_cache, is_out_of_memory
from fts.trainer.run.callback_step import CallbackStep
from fts.trainer.run.context import Run, RunContext
from fts.trainer.run.control import DueByControl, all_reduce_control
from fts.trainer.run.nonfinite import RollbackSnapshot
from fts.trainer.run.token_count import TokenCounter

logger = logging.getLogger(__name__)

NOTHING = Due()

AfterStep: TypeAlias = Callable[[StepEnd, Any], None]
"""What is done after an update and before callbacks get its event, given the event and the batch."""


class CallbackDispatcher:
    """Calls the callbacks with the events of a run, and answers the loop what they ask for.

    Args:
        context: what the run is given.
        run: the run.
        ignore_keys: the model's outputs that evaluations do not keep.
        start: `time.perf_counter()` when the run began.
        writer: writes the checkpoints.
    """

    def __init__(
        self, context: RunContext, run: Run, ignore_keys: list[str] | None, start: float, writer: loops.AsyncCheckpointer
    ) -> None:
        self.context = context
        self.trainer = context.trainer
        self.args = context.args
        self.world = context.world
        self.call_event = context.hooks.call_event
        self.callback_handler = context.callback_handler
        self.run = run
        self.trainer_state = run.trainer_state
        self.running_metrics = run.running_metrics
        self.ignore_keys = ignore_keys
        self.start = start
        self.writer = writer
        self.snapshot: RollbackSnapshot | None = None
        if self.args.nonfinite == "rollback":
            self.snapshot = RollbackSnapshot(run.trainer_state, run.running_metrics, self.callback_handler.callbacks)
        self.token_counter = TokenCounter.of(context)
        self.batches = run.source.batches_per_epoch
        self.accumulate = run.plan.accumulate
        self.total = run.plan.total_steps
        self.step = CallbackStep(context, run)
        self.checkpoints = self._checkpoint_manager()
        self.last: StepEnd | None = None
        self.in_place: bool | None = None
        self.request = StopRequest()
        self.accumulator = loops.MetricAccumulator()
        self.stopping = False
        self.control_may_differ = False
        self.seed = run.state.seed
        self.after_step: list[AfterStep] = [self._update_model, *self._optional_actions()]

    def _checkpoint_manager(self) -> CheckpointManager:
        context = self.context
        hooks = CheckpointHooks(
            callback_states=self._callback_states,
            sync_counts=lambda: self.token_counter.sync(self.trainer_state),
            optimizer_changes=self.step.optimizer_changes,
            save_model=context.hooks.save_model,
            after_save=context.hooks.after_save,
        )
        return CheckpointManager(
            self.run,
            hooks,
            self.writer,
            args=self.args,
            model=context.model,
            processing_class=context.processing_class,
            world=self.world,
        )

    def _callback_states(self) -> dict[str, Any]:
        """The states of the callbacks and the control flags, as a checkpoint keeps them."""
        control = self.trainer.control
        control.should_save = False
        return states_to_save([*self.callback_handler.callbacks, control])

    def _optional_actions(self) -> Iterator[AfterStep]:
        args, run = self.args, self.run
        if self.token_counter:
            yield lambda event, batch: self.token_counter.add(batch)
        if run.optimizer.scheduler is not None:
            yield lambda event, batch: run.optimizer.after_update(event.state, event.counters.step, event.metrics)
        every = args.torch_empty_cache_steps
        if every:
            yield lambda event, batch: empty_cache(args.device) if event.counters.step % every == 0 else None

    def events(self, state: TrainState, start: Position) -> Iterator[loops.Event]:
        """The events of the loop, from a state and a position on."""
        run, by_steps = self.run, self.args.max_steps > 0
        self.accumulator = loops.MetricAccumulator(skip_nonfinite=self.args.logging_nan_inf_filter)
        return loops.fit(
            self.step.step,
            state,
            run.sampled_source,
            total_steps=run.trainer_state.global_step if self.trainer.control.should_training_stop else run.plan.total_steps,
            epochs=None if run.source.batches_per_epoch is None or run.epoch_layout.offset or by_steps else run.plan.epochs,
            start=start,
            due=self.due,
            evaluate=self.evaluate,
            save=self.checkpoints.save,
            accumulator=self.accumulator,
        )

    def dispatch(self, events: Iterator[Any]) -> None:
        """Run the loop to its end. The two branches that run at each step come first, and do no more than they must."""
        trainer, trainer_state, request = self.trainer, self.trainer_state, self.request
        listeners, call_event = self.callback_handler.listeners, self.call_event
        batches, accumulate = self.batches, self.accumulate
        step = self.step
        user_callbacks = bool(self.world.all_reduce(torch.tensor(int(step.has_user_callbacks()))))  # one rank alone may have them
        step.watch(user_callbacks)
        self.control_may_differ = user_callbacks and self.world.size > 1
        for event in events:
            kind = type(event)
            if kind is StepBegin:
                control = trainer.control
                control.should_log = control.should_evaluate = control.should_save = False
                step.batch, step.state = event.batch, event.state
                if listeners["on_step_begin"]:
                    call_event("on_step_begin")
                step.begin(event)
            elif kind is StepEnd:
                self.last = event
                step.end(event)
                for act in self.after_step:
                    act(event, step.batch)
                counters = event.counters
                trainer_state.global_step = counters.step
                if batches:
                    trainer_state.epoch = counters.epoch + min(counters.batch * accumulate, batches) / batches
                else:
                    trainer_state.epoch = counters.epoch + counters.batch / self.total
                call_event("on_step_end", metrics=event.metrics)
                if self.checkpoints.is_due():
                    trainer.control.should_save = True
                if self.writer.has_failed:
                    request.ask()  # the last save, in which all ranks take part, raises it on all
                if request.poll():
                    self._stop(evaluation_pending=trainer.control.should_evaluate)
            else:
                self._dispatch_other(kind, event)

    def due(self, counters: Counters) -> Due:
        """What the control flags ask for now."""
        self.agree()
        control = self.trainer.control
        if control.should_log and self.running_metrics.read_at == counters.step:
            self._log()  # the loop has no new metrics, because they were read for a checkpoint
        at_end = counters.moment in ("end", "stop")
        if at_end and self.last is not None:
            if self.request.poll():
                self._stop(evaluation_pending=self.checkpoints.evaluation_pending)
            control.should_save = self.checkpoints.needs_final_save(counters.step, asked=self.stopping or control.should_save)
        read = at_end or (self.snapshot is not None and self.snapshot.is_due(counters.step))
        asked = control.should_log or control.should_evaluate or control.should_save
        if read or asked or control.should_training_stop or control.should_epoch_stop:
            return cast(Due, DueByControl(self.trainer, read, self.agree))
        return NOTHING

    def agree(self) -> None:
        """Make the control flags those of all ranks, where the user's callbacks could make them differ."""
        if self.control_may_differ:
            all_reduce_control(self.trainer.control, self.world)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Evaluate the model, which has the state's weights, and note whether it is the best so far."""
        control, optimizer = self.trainer.control, self.run.optimizer
        control.should_evaluate = False
        self.checkpoints.evaluation_pending = True  # until it is done: also for a checkpoint after an error in it
        try:
            with swap_eval_params(self.context.model, state, optimizer.transform):
                metrics = self.run_evaluation()
        except EvaluationInterrupted:
            self._stop(evaluation_pending=True)
            return {}
        if optimizer.needs_metric:
            optimizer.step_on_metric(state, metric_for_best_model(self.args, metrics))
        is_best = update_best_metric(self.args, self.trainer_state, metrics)
        if self.args.save_strategy == SaveStrategy.BEST:
            self.trainer.control.should_save = is_best
        self.checkpoints.evaluation_pending = False
        if self.request.poll():
            self._stop(evaluation_pending=False)
        return metrics

    def _stop(self, *, evaluation_pending: bool) -> None:
        """Save and stop at this step, as the run is asked to; a pending evaluation is left to the run that resumes."""
        control = self.trainer.control
        self.stopping, self.checkpoints.evaluation_pending = True, evaluation_pending
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False  # a run that is asked to stop should not take long

    def evaluate_on_start(self) -> None:
        """Evaluate before the first update."""
        try:
            self.run_evaluation()
        except EvaluationInterrupted:
            self.trainer.control.should_training_stop = True

    def warn_of_stop(self) -> None:
        """Log that the run was asked to stop, and what it saved."""
        close_bars(self.callback_handler.callbacks)
        step, what = self.trainer_state.global_step, "nothing was saved"
        if self.checkpoints.saved_step == step:
            what = f"{self.checkpoints.path_of(step)} is written: train(resume_from_checkpoint=True) resumes it"
        logger.warning("Stopped by %s after step %s; %s.", self.request.reason, step, what)

    def save_on_error(self, error: Exception) -> None:
        """Write a checkpoint of the last update after an error, with the metrics that the loop has not read."""
        if self.last is None:
            return
        means, last, steps = self.accumulator.read()
        if steps:
            event = Logged(self.last.counters, means, last, steps)
            self.running_metrics.update(event, skip_nonfinite=self.args.logging_nan_inf_filter)
        will_retry = self.args.auto_find_batch_size and is_out_of_memory(error)
        self.checkpoints.save_on_error(error, self.last, will_retry=will_retry)

    def run_pending_evaluation(self, state: TrainState) -> None:
        """Evaluate, which was due at the last step of an interrupted run, and save again with that."""
        self.run.optimizer.latest.state = state
        history, step = self.trainer_state.log_history, self.trainer_state.global_step
        # the history has it already where a callback failed after it
        history[:] = [entry for entry in history if entry.get("step") != step or not any(map(_is_eval_metric, entry))]
        self.evaluate(state)
        self.checkpoints.save(state, self.run.start)
        self.call_event("on_save")

    def run_evaluation(self) -> dict[str, float]:
        """The metrics of the trainer's `evaluate`, which a subclass may override; its random numbers depend on the step alone."""
        trainer, step = self.trainer, self.trainer_state.global_step
        seed_generators(fold_in(self.seed, EVALUATION, step), self.args.device)
        metrics = trainer.evaluate() if self.ignore_keys is None else trainer.evaluate(ignore_keys=self.ignore_keys)
        report = self.context.hooks.report_evaluation
        if report is not None and report(metrics, step):
            trainer.control.should_training_stop = True
        return metrics

    def _dispatch_other(self, kind: type[Any], event: Any) -> None:
        trainer = self.trainer
        if kind is Logged:
            self.running_metrics.update(event, skip_nonfinite=self.args.logging_nan_inf_filter)
            if trainer.control.should_log:
                self._log()
        elif kind is Saved:
            if any(getattr(listener, "reads_checkpoints", True) for listener in self.callback_handler.listeners["on_save"]):
                # callbacks find the checkpoint complete; an error of several ranks is raised in a collective
                (self.writer.wait if self.world.size == 1 else self.writer.join)()
            self.call_event("on_save")
        elif kind is RolledBack and self.snapshot is not None:
            self.snapshot.restore()
            self.token_counter.reset()
            self.last = None  # its state was rolled back
        elif kind is EpochBegin:
            trainer.control.should_epoch_stop = False
            self.call_event("on_epoch_begin")
        elif kind is EpochEnd and not self.stopping:  # otherwise it is called when the run resumes and comes to it
            self.call_event("on_epoch_end")

    def _update_model(self, event: StepEnd, batch: Any) -> None:
        # The usual optimizers write the model's own tensors; the first step shows whether one makes new ones.
        if self.in_place:
            return
        self.in_place = self.in_place is None and shares_storage(event.state, self.context.model)
        if not self.in_place:
            event.state.apply_to(self.context.model)

    def _log(self) -> None:
        self.trainer.control.should_log = False
        if self.running_metrics.steps:
            self.token_counter.sync(self.trainer_state)
            self._call_log(self.running_metrics.pop_logs())

    def _call_log(self, logs: dict[str, float]) -> None:
        # the `log` of many scripts takes the metrics alone
        if len(inspect.signature(self.trainer.log).parameters) > 1:
            self.trainer.log(logs, self.start)
        else:
            self.trainer.log(logs)


def _is_eval_metric(name: str) -> bool:
    return name.startswith("eval_")
