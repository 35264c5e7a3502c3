"""The training loop of a run: from its start to its output."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import Any

from fts import loops
from fts.distributed.async_reduce import AsyncAllReduceMax
from fts.distributed.deepspeed import gathered_parameters
from fts.errors import Interrupted, NonFiniteError
from fts.trainer.callbacks import close_bars, export_callbacks
from fts.trainer.checkpoints import load_best_model, remaining_time, saves_checkpoints
from fts.trainer.distributed import make_checkpointer, reading_group
from fts.trainer.evaluation import TrainOutput, best_checkpoint
from fts.trainer.model import all_labels_ignored, apply_eval_params, debug_overflow, in_train_mode, neftune_noise
from fts.trainer.reporting import speed_metrics
from fts.trainer.run.context import Run, RunContext
from fts.trainer.run.dispatcher import CallbackDispatcher
from fts.trainer.run.nonfinite import CHOICES, LABELS, with_rollback

logger = logging.getLogger(__name__)

TIME_IS_UP = 75
"""The exit status of a run that `max_time` ended: EX_TEMPFAIL of sysexits.h, "try again later"."""


def run_training(context: RunContext, run: Run, ignore_keys: list[str] | None = None) -> TrainOutput:
    """Run the loop over the data, and call the callbacks with its events.

    Args:
        context: what the run is given.
        run: what it starts from.
        ignore_keys: the model's outputs that evaluations do not keep.

    Returns:
        The number of updates, the mean loss, and the metrics of the run.

    Raises:
        CallbackError: a callback raised; a checkpoint of the last update was written.
        Interrupted: SIGTERM, SIGINT or SIGUSR1 came, or `max_time` is over; the update was finished, and a checkpoint written.
    """
    model, args, trainer = context.model, context.args, context.trainer
    start, first_step = time.perf_counter(), run.trainer_state.global_step
    writer = make_checkpointer(args, context.world)
    dispatcher = CallbackDispatcher(context, run, ignore_keys, start, writer)
    context.hooks.call_event("on_train_begin")
    with (
        closing(run.source),  # its workers would live until Python collects the run
        writer,
        AsyncAllReduceMax(context.world) as agree,
        loops.handle_preemption(max_time=remaining_time(args.max_time, since=context.start_time), agree=agree) as request,
        in_train_mode(model),
        neftune_noise(model, args.neftune_noise_alpha),
        debug_overflow(model, args.debug),
    ):
        trainer.request = dispatcher.request = request
        try:
            if saves_checkpoints(args):
                export_callbacks(context.callback_handler.callbacks)  # an error now rather than at the first checkpoint
            if args.eval_on_start:
                dispatcher.evaluate_on_start()
            if run.evaluation_pending:
                dispatcher.run_pending_evaluation(run.state)
            events = with_rollback(args, model, dispatcher.events, run.state, run.start, dispatcher.snapshot)
            dispatcher.dispatch(writer.watch(loops.with_error_context(events, run.source)))
            if request.code:
                dispatcher.warn_of_stop()
        except BaseException as error:
            close_bars(context.callback_handler.callbacks)
            if isinstance(error, NonFiniteError):
                _add_notes(error, context, dispatcher.step.batch)
            if isinstance(error, Exception):
                dispatcher.save_on_error(error)
            raise
        finally:
            trainer.request = None
    if request.reason == "max_time" and run.trainer_state.global_step < run.plan.total_steps:
        raise Interrupted(TIME_IS_UP, "max_time")
    return _finish(context, run, dispatcher, first_step)


def _add_notes(error: NonFiniteError, context: RunContext, batch: Any) -> None:
    """Note what else can be done about a loss that is not finite, and what its cause may be."""
    error.add_note(CHOICES)
    if context.world.size > 1:
        error.add_note(f"The examples are those of rank {context.world.rank}; the cause may be in another's.")
    if all_labels_ignored(context.model, batch, context.label_names):
        error.add_note(LABELS)


def _finish(context: RunContext, run: Run, dispatcher: CallbackDispatcher, first_step: int) -> TrainOutput:
    """Log the metrics of a run that has ended, load its best model, and upload it, where the arguments ask for that."""
    model, args, trainer_state = context.model, context.args, run.trainer_state
    state, transform = dispatcher.step.state, run.optimizer.transform
    apply_eval_params(model, state, transform)
    trained = trainer_state.global_step - first_step
    loss = run.running_metrics.mean_loss(trainer_state.global_step)
    metrics = speed_metrics("train", dispatcher.start, run.plan.samples * trained / run.plan.total_steps, trained)
    dispatcher.token_counter.sync(trainer_state)
    metrics |= {"total_flos": trainer_state.total_flos, "train_loss": loss} | dict(context.memory_metrics())
    context.trainer.log(metrics)
    best = best_checkpoint(args, trainer_state)
    if best is not None:
        logger.info("Loading the weights of the best evaluation (%s), from %s.", trainer_state.best_metric, best)
        path = str(dispatcher.checkpoints.directory / best)
        with gathered_parameters(model.parameters(), write=True):
            load_best_model(model, path, state, transform, reading_group(args, context.world))
    context.hooks.call_event("on_train_end")
    context.hooks.push_at_end()
    return TrainOutput(trainer_state.global_step, loss, metrics)
