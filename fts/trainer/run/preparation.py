"""The preparation of a run: everything that it starts from."""

from __future__ import annotations

import logging
from pathlib import Path

import attrs

from fts import distributed
from fts.distributed.error_propagation import check_same_on_all_ranks
from fts.loops import Position
from fts.loops.checkpoint_list import checkpoints_in
from fts.loops.checkpoint_status import looks_complete
from fts.messages import abbreviate
from fts.state import TrainState
from fts.trainer.arguments import Plan, TrainingArguments
from fts.trainer.callbacks import TrainerState, restore_callbacks
from fts.trainer.checkpoints import (
    EpochLayout,
    is_transformers_checkpoint,
    load_epoch_layout,
    saves_checkpoints,
)
from fts.trainer.data import data_seed, with_batch_samples
from fts.trainer.distributed import parallelize_model
from fts.trainer.reporting import RunningMetrics
from fts.trainer.run.context import Run, RunContext
from fts.trainer.run.plan import resolve_plan
from fts.trainer.run.resume import resume, resume_from_transformers

logger = logging.getLogger(__name__)


def prepare_run(context: RunContext, checkpoint: Path | None, batch_size: int) -> Run:
    """Resolve the arguments, build the step, and read the checkpoint to resume from, if there is one.

    A resumed run keeps the seeds that it began with; all other arguments are those of the context.

    Args:
        context: has the model, the data and the arguments.
        checkpoint: to resume from; None for a new run.
        batch_size: examples in a micro-batch.
    """
    args, hooks = context.args, context.hooks
    from_transformers = checkpoint is not None and is_transformers_checkpoint(checkpoint)
    old = None if checkpoint is None or from_transformers else load_epoch_layout(checkpoint)
    run = _new_run(context, batch_size, data_seed(args) if old is None else old.seed)
    if checkpoint is None:
        _warn_about_other_checkpoints(args)
    else:
        if from_transformers:
            run = resume_from_transformers(context, run, checkpoint, batch_size)
        else:
            run = resume(context, run, checkpoint, old, batch_size)
        arguments = args.restore_callback_states_from_checkpoint
        restore_callbacks(context.callback_handler.callbacks, run.trainer_state.stateful_callbacks, arguments=arguments)
    plan, state = run.plan, run.trainer_state
    state.max_steps, state.num_train_epochs, state.train_batch_size = plan.total_steps, plan.epochs, plan.train_batch_size
    state.logging_steps, state.eval_steps, state.save_steps = plan.logging_steps, plan.eval_steps, plan.save_steps
    sampled_source = run.source
    if hooks.get_batch_samples is not None:
        sampled_source = with_batch_samples(run.source, hooks.get_batch_samples, args.device)
    run = attrs.evolve(run, step=hooks.make_step(plan, run.optimizer), sampled_source=sampled_source)
    _log_run(context, run)
    return run


def _new_run(context: RunContext, batch_size: int, seed: int) -> Run:
    """A run at its beginning, as yet without its step."""
    args, model, hooks = context.args, context.model, context.hooks
    parallelize_model(model, args, context.world)
    source = hooks.train_source(seed)
    shard = source.shard
    layout = EpochLayout(
        # examples that each of `shard.stride` ranks has, or that all have in sum
        batch_size=batch_size if source.batch_size is None else source.batch_size * (shard.world_size // shard.stride),
        micro_batches=args.gradient_accumulation_steps,
        items=source.num_examples,
        drop_last=args.dataloader_drop_last,
        shares=source.stream_workers,
        seed=seed,
        processes=shard.stride,
    )
    plan = resolve_plan(context, source, batch_size)
    _check_same_on_all_ranks(context, layout, plan)
    optimizer = hooks.start_engine(plan, hooks.make_optimizer(plan))
    # The state takes the module's tensors over and steps write them in place, so the model always has the latest weights.
    state = TrainState.create(model, optimizer.transform, seed=args.seed, copy=False)
    if optimizer.engine is None:
        state = distributed.broadcast_state(state, context.group)
    elif saves_checkpoints(args) and args.process_index == 0:
        logger.warning("Checkpoints of a run under DeepSpeed have the weights alone, so that no run can resume from them.")
    return Run(plan, optimizer, None, state, source, source, layout, Position(), TrainerState(), RunningMetrics())


def _check_same_on_all_ranks(context: RunContext, layout: EpochLayout, plan: Plan) -> None:
    """Raise DistributedError where the ranks were given different data, or arguments that make a different run."""
    args = context.args
    values = attrs.asdict(layout) | attrs.asdict(plan, filter=lambda field, value: field.name != "schedule")
    strategies = {name: str(getattr(args, name)) for name in ("logging_strategy", "eval_strategy", "save_strategy")}
    check_same_on_all_ranks(context.world, values | strategies | {"seed": args.seed, "data_seed": layout.seed})


def _warn_about_other_checkpoints(args: TrainingArguments) -> None:
    """Warn a new run of the checkpoints of another one in its output directory."""
    others = [path for path in checkpoints_in(str(args.output_dir)).values() if looks_complete(path)]
    if others and args.should_log:
        logger.warning(
            "This is a new run, but output_dir=%r has checkpoints of another one: %s. Until this run has saved a step beyond "
            "%s, resume_from_checkpoint=True takes %s, which is not of this run. Choose another output_dir, or delete or move "
            "them (`fts checkpoints %s` lists them).",
            *(str(args.output_dir), abbreviate([path.name for path in others]), others[-1].name.removeprefix("checkpoint-")),
            *(others[-1].name, args.output_dir),
        )


def _log_run(context: RunContext, run: Run) -> None:
    """Log what is about to happen."""
    plan, num_examples, hooks = run.plan, run.source.num_examples, context.hooks
    if hooks.num_examples is not None:
        num_examples = hooks.num_examples(context.callback_handler.train_dataloader)
    logger.info("***** Running training *****")
    logger.info("  Num examples = %s", num_examples)
    logger.info("  Num Epochs = %s", plan.epochs)
    logger.info("  Instantaneous batch size per device = %s", plan.train_batch_size)
    logger.info("  Total train batch size (with accumulation) = %s", hooks.total_train_batch_size())
    logger.info("  Gradient Accumulation steps = %s", plan.accumulate)
    logger.info("  Total optimization steps = %s", plan.total_steps)
    logger.info("  Number of trainable parameters = %s", hooks.num_trainable_parameters())
    if run.trainer_state.global_step:
        step, start = run.trainer_state.global_step, run.start
        logger.info("  Resuming at update %s: epoch %s, batch %s", step, start.epoch, start.batch)
