"""A run that resumes: what it reads from a checkpoint, and what it warns of."""

from __future__ import annotations

import logging
from pathlib import Path

import attrs

from fts import loops
from fts.distributed import Group
from fts.errors import CheckpointError
from fts.loops import Position
from fts.loops.checkpoint_list import checkpoints_in
from fts.loops.checkpoint_status import is_complete
from fts.loops.trainer_state import TRAINER_STATE_NAME
from fts.state import TrainState
from fts.storage import check_type
from fts.trainer.arguments import Plan, TrainingArguments
from fts.trainer.callbacks import TrainerState
from fts.trainer.checkpoints import (
    STATE_ARGUMENTS,
    EpochLayout,
    changed_arguments,
    convert_position,
    list_changes,
    load_arguments,
    load_group_changes,
    load_running_metrics,
    load_train_state,
    log_report,
    process_changes,
    read_transformers_checkpoint,
    seed_changes,
    step_offset,
    transformers_step_offset,
)
from fts.trainer.distributed import reading_group
from fts.trainer.optimization import load_torch_state_dict
from fts.trainer.run.context import Run, RunContext
from fts.trainer.run.plan import resolve_plan

logger = logging.getLogger(__name__)


def resume(context: RunContext, run: Run, checkpoint: Path, old: EpochLayout | None, batch_size: int) -> Run:
    """A new run, continued from a checkpoint of fts.

    Args:
        context: what the run is given.
        run: the new run.
        checkpoint: to resume from.
        old: how the examples of an epoch were split into updates before; None where the checkpoint does not say.
        batch_size: examples in a micro-batch.
    """
    args, where = context.args, str(checkpoint)
    loaded, start = _load(args, checkpoint, run.state, reading_group(args, context.world))
    if old is not None:
        start = _convert_position(start, old, run.epoch_layout)
        run = _with_offset(context, run, step_offset(int(loaded.step), start, old, run.epoch_layout), batch_size)
    if args.ignore_data_skip:
        start = Position(start.epoch, 0)
    loaded.apply_to(context.model)
    state = run.state.replace(opt_state=loaded.opt_state, step=loaded.step, seed=loaded.seed)
    trainer_state, extra = TrainerState.load_from_json(checkpoint / TRAINER_STATE_NAME), loops.load_extra(checkpoint)
    running_metrics, optimizer_changes = load_running_metrics(checkpoint), load_group_changes(checkpoint)
    if run.optimizer.steps_scheduler and "torch" in extra:
        torch_state = check_type(extra["torch"], dict, where)
        load_torch_state_dict(run.optimizer.optimizer, run.optimizer.scheduler, torch_state)
    _warn_of_changes(args, run.plan, trainer_state, checkpoint, seed_changes(args, state.seed, run.epoch_layout.seed))
    for line in [] if old is None else process_changes(old, run.epoch_layout):
        logger.warning("%s: this run wins.", line)
    source = run.source
    if not args.ignore_data_skip and (old is None or old.items == run.epoch_layout.items):
        source = source.with_state_dict(start, check_type(extra.get("data"), dict | None, where))
    return attrs.evolve(
        run,
        state=state,
        source=source,
        start=start,
        trainer_state=trainer_state,
        running_metrics=running_metrics,
        optimizer_changes=optimizer_changes,
        evaluation_pending=extra.get("owes") is True,
    )


def resume_from_transformers(context: RunContext, run: Run, checkpoint: Path, batch_size: int) -> Run:
    """A new run, continued from a checkpoint of transformers' Trainer."""
    batches, accumulate = run.source.batches_per_epoch, run.plan.accumulate
    run = _with_offset(context, run, transformers_step_offset(checkpoint, batches, accumulate), batch_size)
    found = read_transformers_checkpoint(
        checkpoint, run.state, context.model, run.optimizer, batches=batches, accumulate=accumulate
    )
    found.state.apply_to(context.model)
    state = run.state.replace(opt_state=found.state.opt_state, step=found.state.step)
    log_report(checkpoint, found)
    _warn_of_changes(context.args, run.plan, found.trainer_state, checkpoint, [])
    return attrs.evolve(
        run, state=state, start=found.start, trainer_state=found.trainer_state, running_metrics=found.running_metrics
    )


def _with_offset(context: RunContext, run: Run, offset: int, batch_size: int) -> Run:
    """The run after so many more updates than its layout needs, so that its length and its schedule count them."""
    if not offset:
        return run
    plan = resolve_plan(context, run.source, batch_size, offset)
    optimizer = context.hooks.make_optimizer(plan)
    return attrs.evolve(run, plan=plan, optimizer=optimizer, epoch_layout=attrs.evolve(run.epoch_layout, offset=offset))


def saved_batch_size(checkpoint: Path | None) -> int | None:
    """The batch size that the run of a checkpoint had found to fit into memory; None without a checkpoint."""
    return None if checkpoint is None else TrainerState.load_from_json(checkpoint / TRAINER_STATE_NAME).train_batch_size


def _convert_position(position: Position, old: EpochLayout, new: EpochLayout) -> Position:
    if position.batch and old.items != new.items:
        logger.warning(
            "The training set has %s examples, that of the checkpoint had %s: epoch %s is in another order now, so that some "
            "of its examples are trained twice or not at all. Resume from a checkpoint at the end of an epoch to avoid it.",
            *(new.items, old.items, position.epoch),
        )
    return convert_position(position, old, new)


def _load(args: TrainingArguments, checkpoint: Path, template: TrainState, group: Group) -> tuple[TrainState, Position]:
    try:
        return load_train_state(checkpoint, template, group)
    except CheckpointError as error:
        if not is_complete(checkpoint):
            raise
        changed = changed_arguments(args, load_arguments(checkpoint), STATE_ARGUMENTS)
        if not changed:
            raise
        raise CheckpointError(
            f"{error} These arguments decide what the optimizer keeps, and changed: {'; '.join(changed)}. Set them as they were, "
            "or start a new run with the checkpoint's model."
        ) from error


def _warn_of_changes(
    args: TrainingArguments, plan: Plan, trainer_state: TrainerState, checkpoint: Path, seeds: list[str]
) -> None:
    for line in list_changes(args, plan, trainer_state, load_arguments(checkpoint)):
        logger.warning("%s: args win.", line)
    for line in seeds:
        logger.warning("%s: the checkpoint wins, so that the order of the data and dropout are those of one run.", line)
    trainer_state.best_model_checkpoint = _relocate_best(checkpoint, trainer_state.best_model_checkpoint)


def _relocate_best(checkpoint: Path, best: str | None) -> str | None:
    """Where the best checkpoint is now: next to the resumed one if it was there before, else where it was; None if gone."""
    root, exists = checkpoint.parent, best is not None and Path(best).is_dir()
    if best is None or (exists and Path(best).resolve().parent == root.resolve()):
        return best
    sibling = next((path for path in checkpoints_in(root).values() if path.name == Path(best).name), None)
    was_sibling = str(Path(best).parent) == load_arguments(checkpoint).get("output_dir")
    if sibling is not None and (was_sibling or not exists):
        logger.warning("The run was moved: its best checkpoint, %s, is now %s.", best, sibling)
        return str(sibling)
    if not exists:
        logger.warning("The best checkpoint, %s, does not exist any more, nor one of that name in %s.", best, root)
    return best if exists else None
