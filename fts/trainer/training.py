"""A training run: what it starts from, and what is read from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from fts import loops, steps
from fts.loops import Position, Source
from fts.loops.checkpoints import load_extra
from fts.state import TrainState
from fts.trainer import saving
from fts.trainer.callbacks import restore_callbacks
from fts.trainer.losses import Loss, train_loss
from fts.trainer.plan import Plan, decayed_names, make_plan
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
        start: where in the batches to begin.
        told: the state that callbacks see.
        tally: figures that were read before, but not logged.
    """

    plan: Plan
    step: Any
    state: TrainState
    source: Source
    start: Position
    told: TrainerState
    tally: Tally


def make_step(model: nn.Module, loss: Loss, plan: Plan) -> Any:
    """The step of training: the model's loss, its gradients, and the plan's optimizer."""
    step = steps.train_step(train_loss(model, loss), plan.transform, precision=plan.precision)
    return steps.compile(step) if plan.compiled else step


def prepare(trainer: Trainer, checkpoint: Path | None) -> Run:
    """Resolve the arguments, build the step, and read the checkpoint to resume from, if there is one."""
    args, model = trainer.args, trainer.model
    source = trainer.train_source()
    plan = make_plan(args, batches=source.batches_per_epoch, items=source.num_items, decayed=decayed_names(model))
    # The state takes the module's tensors over and steps write them in place, so the model always has the latest weights.
    state = TrainState.create(model, plan.transform, seed=args.seed, copy=False)
    told, tally, start = TrainerState(), Tally(), Position()
    if checkpoint is not None:
        loaded, start = loops.load_checkpoint(checkpoint, like=state)
        loaded.apply_to(model)
        state = state.replace(opt_state=loaded.opt_state, step=loaded.step, seed=loaded.seed)
        told = TrainerState.load_from_json(checkpoint / STATE_FILE)
        if told.best_model_checkpoint is not None and not Path(told.best_model_checkpoint).is_dir():
            logger.warning("The best checkpoint, %s, does not exist any more.", told.best_model_checkpoint)
            told.best_model_checkpoint = None
        tally = Tally(**load_extra(checkpoint).get("tally", {}))
        for line in differences(plan, told):
            logger.warning("%s: the arguments differ from those of the checkpoint, and win.", line)
        restore_callbacks(trainer.callback_handler.callbacks, told.stateful_callbacks)
    told.max_steps, told.num_train_epochs, told.train_batch_size = plan.total_steps, plan.epochs, plan.train_batch_size
    told.logging_steps, told.eval_steps, told.save_steps = plan.logging_steps, plan.eval_steps, plan.save_steps
    run = Run(plan, make_step(model, trainer.loss, plan), state, source, start, told, tally)
    announce(run)
    return run


def differences(plan: Plan, told: TrainerState) -> list[str]:
    """How a resumed run differs from its checkpoint, one line each."""
    pairs = {
        "logging_steps": (plan.logging_steps, told.logging_steps),
        "eval_steps": (plan.eval_steps, told.eval_steps),
        "save_steps": (plan.save_steps, told.save_steps),
        "per_device_train_batch_size": (plan.train_batch_size, told.train_batch_size),
    }
    return [f"{name}: {new} (from args) != {old} (from {STATE_FILE})" for name, (new, old) in pairs.items() if new != old]


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


def save_run(trainer: Trainer, state: TrainState, position: Position, tally: Tally) -> Path:
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
        extra={"tally": tally.to_dict()},
    )
    saving.rotate(root, trainer.args.save_total_limit, told.best_model_checkpoint)
    return path
