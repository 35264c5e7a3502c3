"""A training run: what it starts from, and what is read from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from fts import loops, steps
from fts.errors import CheckpointError
from fts.loops import Position, Source
from fts.loops.checkpoints import is_whole
from fts.state import TrainState
from fts.trainer import saving
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import restore_callbacks
from fts.trainer.loading import is_indexable
from fts.trainer.losses import Loss, train_loss
from fts.trainer.plan import Plan, decayed_names, make_plan
from fts.trainer.resuming import (
    SHAPING,
    Cut,
    argument_changes,
    changes,
    convert,
    cut_of,
    offset_after,
    saved_arguments,
    seed_changes,
)
from fts.trainer.state import STATE_FILE, TrainerState
from fts.trainer.tally import Tally

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Run:
    """Everything that a training run starts from.

    Attributes:
        plan: the resolved arguments.
        step: `(state, batch) -> (state, metrics)`.
        state: the core's state; its tensors are those of the model.
        source: the batches.
        cut: how these make updates.
        start: where in the batches to begin.
        told: the state that callbacks see.
        tally: figures that were read before, but not logged.
    """

    plan: Plan
    step: Any
    state: TrainState
    source: Source
    cut: Cut
    start: Position
    told: TrainerState
    tally: Tally


def make_step(model: nn.Module, loss: Loss, plan: Plan) -> Any:
    """The step of training: the model's loss, its gradients, and the plan's optimizer."""
    step = steps.train_step(train_loss(model, loss), plan.transform, precision=plan.precision)
    return steps.compile(step) if plan.compiled else step


def prepare(trainer: Trainer, checkpoint: Path | None) -> Run:
    """Resolve the arguments, build the step, and read the checkpoint to resume from, if there is one.

    A resumed run keeps the seeds that it began with; all other arguments are those of the trainer.
    """
    args, model = trainer.args, trainer.model
    old = None if checkpoint is None else cut_of(checkpoint)
    seed = args.data_seed if args.data_seed is not None else args.seed
    source = trainer.train_source(seed if old is None else old.seed)
    cut = _cut(trainer, source, seed if old is None else old.seed)
    sizes: dict[str, Any] = {"batches": source.batches_per_epoch, "items": source.num_items, "decayed": decayed_names(model)}
    plan = make_plan(args, **sizes)
    # The state takes the module's tensors over and steps write them in place, so the model always has the latest weights.
    state = TrainState.create(model, plan.transform, seed=args.seed, copy=False)
    told, tally, start = TrainerState(), Tally(), Position()
    if checkpoint is not None:
        loaded, start = _load(args, checkpoint, state)
        if old is not None:
            start = _moved(start, old, cut)
            cut = attrs.evolve(cut, offset=offset_after(int(loaded.step), start, old, cut))
            plan = make_plan(args, **sizes, offset=cut.offset)
        loaded.apply_to(model)
        state = state.replace(opt_state=loaded.opt_state, step=loaded.step, seed=loaded.seed)
        told = TrainerState.load_from_json(checkpoint / STATE_FILE)
        tally = Tally(**loops.load_extra(checkpoint).get("tally", {}))
        _warn(args, plan, told, checkpoint, seed_changes(args, state.seed, cut.seed))
        restore_callbacks(trainer.callback_handler.callbacks, told.stateful_callbacks)
    told.max_steps, told.num_train_epochs, told.train_batch_size = plan.total_steps, plan.epochs, plan.train_batch_size
    told.logging_steps, told.eval_steps, told.save_steps = plan.logging_steps, plan.eval_steps, plan.save_steps
    run = Run(plan, make_step(model, trainer.loss, plan), state, source, cut, start, told, tally)
    announce(run)
    return run


def _cut(trainer: Trainer, source: Source, seed: int) -> Cut:
    args = trainer.args
    return Cut(
        batch_size=args.train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        items=source.num_items,
        drop_last=args.dataloader_drop_last,
        shares=1 if is_indexable(trainer.train_dataset) else max(1, args.dataloader_num_workers),
        seed=seed,
    )


def _moved(position: Position, old: Cut, new: Cut) -> Position:
    if position.batch and old.items != new.items:
        logger.warning(
            "The training set has %s rows, that of the checkpoint had %s: epoch %s is in another order now, so that some of its "
            "rows are trained twice or not at all. Resume from a checkpoint at the end of an epoch to avoid it.",
            *(new.items, old.items, position.epoch),
        )
    return convert(position, old, new)


def _load(args: TrainingArguments, checkpoint: Path, like: TrainState) -> tuple[TrainState, Position]:
    try:
        return loops.load_checkpoint(checkpoint, like=like)
    except CheckpointError as error:
        if not is_whole(checkpoint):
            raise
        changed = argument_changes(args, saved_arguments(checkpoint), SHAPING)
        if not changed:
            raise
        raise CheckpointError(
            f"{error} These arguments decide what the optimizer keeps, and changed: {'; '.join(changed)}. Set them as they were, "
            "or start a new run with the checkpoint's model."
        ) from error


def _warn(args: TrainingArguments, plan: Plan, told: TrainerState, checkpoint: Path, seeds: list[str]) -> None:
    for line in changes(args, plan, told, saved_arguments(checkpoint)):
        logger.warning("%s: args win.", line)
    for line in seeds:
        logger.warning("%s: the checkpoint wins, so that the order of the data and dropout are those of one run.", line)
    if told.best_model_checkpoint is not None and not Path(told.best_model_checkpoint).is_dir():
        logger.warning("The best checkpoint, %s, does not exist any more.", told.best_model_checkpoint)
        told.best_model_checkpoint = None


def announce(run: Run) -> None:
    """Log what is about to happen."""
    plan = run.plan
    logger.info("***** Running training *****")
    logger.info("  Num examples = %s", run.source.num_items)
    logger.info("  Num Epochs = %s", plan.epochs)
    logger.info("  Batch size = %s, gradient accumulation steps = %s", plan.train_batch_size, plan.accumulate)
    logger.info("  Total optimization steps = %s", plan.total_steps)
    logger.info("  Trainable parameters = %s", sum(tensor.numel() for tensor in run.state.params.values()))
    if run.told.global_step:
        logger.info("  Resuming at update %s: epoch %s, batch %s", run.told.global_step, run.start.epoch, run.start.batch)


def save_run(trainer: Trainer, run: Run, state: TrainState, position: Position) -> Path:
    """Write a checkpoint, and delete those that are outdated."""
    told, root = trainer.state, Path(str(trainer.args.output_dir))
    if told.best_global_step == told.global_step:
        told.best_model_checkpoint = str(root / f"checkpoint-{told.global_step}")
    path = saving.save_checkpoint(
        root,
        state,
        position,
        model=trainer.model,
        processing_class=trainer.processing_class,
        args=trainer.args,
        trainer_state=told,
        extra={"tally": run.tally.to_dict(), "cut": attrs.asdict(run.cut)},
    )
    loops.rotate_checkpoints(root, trainer.args.save_total_limit, told.best_model_checkpoint)
    return path
