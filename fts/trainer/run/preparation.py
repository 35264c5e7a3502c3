"""A training run: what it starts from, and what is read from a checkpoint."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from fts import distributed, loops
from fts.distributed import Group
from fts.distributed.error_propagation import check_alike
from fts.errors import CheckpointError
from fts.loops import Position, Source
from fts.loops.checkpoint_list import checkpoints_in
from fts.loops.history import TRAINER_STATE
from fts.loops.validation import is_whole, looks_whole
from fts.messages import some
from fts.state import TrainState
from fts.storage import checked
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import restore_callbacks
from fts.trainer.callbacks.state import TrainerState
from fts.trainer.checkpoints.from_transformers import offset_of, read_transformers_checkpoint, report
from fts.trainer.checkpoints.resume import (
    SHAPING,
    Cut,
    argument_changes,
    changes,
    convert,
    cut_of,
    offset_after,
    process_changes,
    saved_arguments,
    seed_changes,
    tally_of,
    written_of,
)
from fts.trainer.checkpoints.state_loading import load_state
from fts.trainer.checkpoints.transformers_files import is_transformers_checkpoint
from fts.trainer.data.batch_samples import drawn_by
from fts.trainer.data.sampling import data_seed
from fts.trainer.distributed.deepspeed import with_engine
from fts.trainer.distributed.strategy import cut_model, verifiers
from fts.trainer.optimization.optimizer import Optimizing
from fts.trainer.optimization.torch_settings import restore_settings
from fts.trainer.run.overrides import overridden
from fts.trainer.run.plan import Plan, make_plan, with_settings
from fts.trainer.run.running_metrics import RunningMetrics

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer

logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Run:
    """Everything that a training run starts from.

    Attributes:
        plan: the resolved arguments.
        optimizing: what updates the weights.
        step: `(state, batch) -> (state, metrics)`.
        state: the core's state; its tensors are those of the model.
        source: the batches.
        drawn: the same, or what the user's `get_batch_samples` makes of them.
        cut: how these make updates.
        start: where in the batches to begin.
        told: the state that callbacks see.
        tally: figures that were read before, but not logged.
        written: what callbacks had written into the optimizer's groups: settings that last, and those of the next update.
        owes: whether an evaluation was due at the step of the checkpoint, and was left out because the run was asked to stop.
    """

    plan: Plan
    optimizing: Optimizing
    step: Any
    state: TrainState
    source: Source
    drawn: Source
    cut: Cut
    start: Position
    told: TrainerState
    tally: RunningMetrics
    written: dict[str, Any] = attrs.Factory(dict)
    owes: bool = False


def prepare(trainer: Trainer, checkpoint: Path | None, batch_size: int) -> Run:
    """Resolve the arguments, build the step, and read the checkpoint to resume from, if there is one.

    A resumed run keeps the seeds that it began with; all other arguments are those of the trainer.

    Args:
        trainer: has the model, the data and the arguments.
        checkpoint: to go on from; None to begin.
        batch_size: rows in a micro-batch.
    """
    foreign = checkpoint is not None and is_transformers_checkpoint(checkpoint)
    old = None if checkpoint is None or foreign else cut_of(checkpoint)
    run = _begun(trainer, batch_size, data_seed(trainer.args) if old is None else old.seed)
    if checkpoint is None:
        _warn_of_others(trainer.args)
    else:
        run = (
            _resumed_hf(trainer, run, checkpoint, batch_size) if foreign else _resumed(trainer, run, checkpoint, old, batch_size)
        )
        arguments = trainer.args.restore_callback_states_from_checkpoint
        restore_callbacks(trainer.callback_handler.callbacks, run.told.stateful_callbacks, arguments=arguments)
    plan, told = run.plan, run.told
    told.max_steps, told.num_train_epochs, told.train_batch_size = plan.total_steps, plan.epochs, plan.train_batch_size
    told.logging_steps, told.eval_steps, told.save_steps = plan.logging_steps, plan.eval_steps, plan.save_steps
    drawn = run.source
    if overridden(trainer, "get_batch_samples"):
        drawn = drawn_by(trainer.get_batch_samples, run.source, trainer.args.device)
    run = attrs.evolve(run, step=trainer.step_of(plan, run.optimizing), drawn=drawn)
    announce(run, trainer)
    return run


def _begun(trainer: Trainer, batch_size: int, seed: int) -> Run:
    """A run at its beginning, as yet without its step."""
    args = trainer.args
    cut_model(trainer)
    source = trainer.train_source(seed)
    part = source.part
    cut = Cut(
        # rows of what `part.stride` processes have each, or of what all have together
        batch_size=batch_size if source.batch_size is None else source.batch_size * (part.size // part.stride),
        micro_batches=args.gradient_accumulation_steps,
        items=source.num_items,
        drop_last=args.dataloader_drop_last,
        shares=source.shares,
        seed=seed,
        processes=part.stride,
    )
    plan = plan_of(trainer, source, batch_size)
    _check_alike(trainer, cut, plan)
    optimizing = with_engine(trainer, plan, trainer.optimizing(plan))
    # The state takes the module's tensors over and steps write them in place, so the model always has the latest weights.
    state = TrainState.create(trainer.model, optimizing.transform, seed=args.seed, copy=False)
    if optimizing.engine is None:  # which has done so itself
        state = distributed.synchronize(state, trainer.group)
    return Run(plan, optimizing, None, state, source, source, cut, Position(), TrainerState(), RunningMetrics())


def _check_alike(trainer: Trainer, cut: Cut, plan: Plan) -> None:
    """Raise DistributedError where the processes were given other data, or arguments that make another run of it."""
    facts = attrs.asdict(cut) | attrs.asdict(plan, filter=lambda field, value: field.name != "schedule")
    args = trainer.args
    strategies = {name: str(getattr(args, name)) for name in ("logging_strategy", "eval_strategy", "save_strategy")}
    check_alike(trainer.world, facts | strategies | {"seed": args.seed, "data_seed": cut.seed})


def _resumed(trainer: Trainer, run: Run, checkpoint: Path, old: Cut | None, batch_size: int) -> Run:
    """The run from a checkpoint on, whose rows were cut as `old`."""
    args = trainer.args
    loaded, start = _load(args, checkpoint, run.state, verifiers(trainer))
    if old is not None:
        start = _moved(start, old, run.cut)
        run = _with_offset(trainer, run, offset_after(int(loaded.step), start, old, run.cut), batch_size)
    if args.ignore_data_skip:
        start = Position(start.epoch, 0)
    loaded.apply_to(trainer.model)
    state = run.state.replace(opt_state=loaded.opt_state, step=loaded.step, seed=loaded.seed)
    told = TrainerState.load_from_json(checkpoint / TRAINER_STATE)
    extra, tally, written = loops.load_extra(checkpoint), tally_of(checkpoint), written_of(checkpoint)
    if run.optimizing.steps and "torch" in extra:
        restore_settings(run.optimizing.optimizer, run.optimizing.scheduler, checked(extra["torch"], dict, str(checkpoint)))
    _warn(args, run.plan, told, checkpoint, seed_changes(args, state.seed, run.cut.seed))
    for line in [] if old is None else process_changes(old, run.cut):
        logger.warning("%s: this run wins.", line)
    source, owes = run.source, extra.get("owes") is True
    if not args.ignore_data_skip and (old is None or old.items == run.cut.items):
        source = source.restored(start, checked(extra.get("data"), dict | None, str(checkpoint)))
    return attrs.evolve(run, state=state, source=source, start=start, told=told, tally=tally, written=written, owes=owes)


def _resumed_hf(trainer: Trainer, run: Run, checkpoint: Path, batch_size: int) -> Run:
    """The run from a checkpoint of transformers' Trainer on."""
    batches, accumulate = run.source.batches_per_epoch, run.plan.accumulate
    run = _with_offset(trainer, run, offset_of(checkpoint, batches, accumulate), batch_size)
    found = read_transformers_checkpoint(
        checkpoint, run.state, trainer.model, run.optimizing, batches=batches, accumulate=accumulate
    )
    found.state.apply_to(trainer.model)
    state = run.state.replace(opt_state=found.state.opt_state, step=found.state.step)
    report(checkpoint, found)
    _warn(trainer.args, run.plan, found.told, checkpoint, [])
    return attrs.evolve(run, state=state, start=found.start, told=found.told, tally=found.tally)


def _with_offset(trainer: Trainer, run: Run, offset: int, batch_size: int) -> Run:
    """The run, which took so many more updates before, so that its length and its schedule count them."""
    if not offset:
        return run
    plan = plan_of(trainer, run.source, batch_size, offset)
    return attrs.evolve(run, plan=plan, optimizing=trainer.optimizing(plan), cut=attrs.evolve(run.cut, offset=offset))


def saved_batch_size(checkpoint: Path | None) -> int | None:
    """The batch size that the run of a checkpoint had found to fit; None to begin."""
    return None if checkpoint is None else TrainerState.load_from_json(checkpoint / TRAINER_STATE).train_batch_size


def plan_of(trainer: Trainer, source: Source, batch_size: int, offset: int = 0) -> Plan:
    """The arguments, resolved for a source; an overridden `set_initial_training_values` decides on epochs, rows and updates.

    Args:
        trainer: has the arguments.
        source: the batches of training.
        batch_size: rows in a micro-batch.
        offset: see `make_plan`.
    """
    args = trainer.args
    sizes: dict[str, Any] = {"batches": source.batches_per_epoch, "items": source.num_items, "batch_size": batch_size}
    if not overridden(trainer, "set_initial_training_values"):
        return make_plan(args, **sizes, offset=offset)
    loader, several = trainer.callback_handler.train_dataloader, trainer.get_total_train_batch_size(args)
    takes_rows = len(inspect.signature(trainer.set_initial_training_values).parameters) > 2
    values = trainer.set_initial_training_values(args, loader, *([several] if takes_rows else []))
    plan = make_plan(with_settings(args, max_steps=values[-1]), **sizes)
    return attrs.evolve(plan, epochs=values[0], samples=values[3])


def _moved(position: Position, old: Cut, new: Cut) -> Position:
    if position.batch and old.items != new.items:
        logger.warning(
            "The training set has %s rows, that of the checkpoint had %s: epoch %s is in another order now, so that some of its "
            "rows are trained twice or not at all. Resume from a checkpoint at the end of an epoch to avoid it.",
            *(new.items, old.items, position.epoch),
        )
    return convert(position, old, new)


def _load(args: TrainingArguments, checkpoint: Path, like: TrainState, group: Group) -> tuple[TrainState, Position]:
    try:
        return load_state(checkpoint, like, group)
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
    told.best_model_checkpoint = _best_now(checkpoint, told.best_model_checkpoint)


def _warn_of_others(args: TrainingArguments) -> None:
    """Say at the beginning of a run which checkpoints of another one lie where it saves its own."""
    others = [path for path in checkpoints_in(str(args.output_dir)).values() if looks_whole(path)]
    if others and args.should_log:
        logger.warning(
            "This run begins anew, but output_dir=%r has checkpoints of another one: %s. Until this run has saved a step beyond "
            "%s, resume_from_checkpoint=True takes %s, which is not of this run. Choose another output_dir, or delete or move "
            "them (`fts checkpoints %s` lists them).",
            *(str(args.output_dir), some([path.name for path in others]), others[-1].name.removeprefix("checkpoint-")),
            *(others[-1].name, args.output_dir),
        )


def _best_now(checkpoint: Path, best: str | None) -> str | None:
    """Where the best checkpoint is now: beside the one to resume if it was there before, else where it was; None if gone."""
    root, exists = checkpoint.parent, best is not None and Path(best).is_dir()
    if best is None or (exists and Path(best).resolve().parent == root.resolve()):
        return best
    beside = next((path for path in checkpoints_in(root).values() if path.name == Path(best).name), None)
    was_beside = str(Path(best).parent) == saved_arguments(checkpoint).get("output_dir")
    if beside is not None and (was_beside or not exists):
        logger.warning("The run was moved: its best checkpoint, %s, is now %s.", best, beside)
        return str(beside)
    if not exists:
        logger.warning("The best checkpoint, %s, does not exist any more, nor one of that name in %s.", best, root)
    return best if exists else None


def announce(run: Run, trainer: Trainer) -> None:
    """Log what is about to happen."""
    plan, examples = run.plan, run.source.num_items
    if overridden(trainer, "num_examples"):
        examples = trainer.num_examples(trainer.callback_handler.train_dataloader)
    logger.info("***** Running training *****")
    logger.info("  Num examples = %s", examples)
    logger.info("  Num Epochs = %s", plan.epochs)
    logger.info("  Instantaneous batch size per device = %s", plan.train_batch_size)
    logger.info("  Total train batch size (with accumulation) = %s", trainer.get_total_train_batch_size(trainer.args))
    logger.info("  Gradient Accumulation steps = %s", plan.accumulate)
    logger.info("  Total optimization steps = %s", plan.total_steps)
    logger.info("  Number of trainable parameters = %s", trainer.get_num_trainable_parameters())
    if run.told.global_step:
        logger.info("  Resuming at update %s: epoch %s, batch %s", run.told.global_step, run.start.epoch, run.start.batch)
