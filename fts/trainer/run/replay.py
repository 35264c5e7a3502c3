"""Replay of one update of a run."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import attrs

from fts import loops
from fts.errors import ArgumentError
from fts.loops import Counters, ReplayedStep, Source, StepBegin
from fts.trainer.callbacks import TrainerControl
from fts.trainer.checkpoints import load_epoch_layout
from fts.trainer.model import in_train_mode, neftune_noise
from fts.trainer.run.callback_step import CallbackStep
from fts.trainer.run.context import Run, RunContext
from fts.trainer.run.preparation import prepare_run
from fts.typing import Batch, Info, Metrics


def replay(context: RunContext, checkpoint: Path, to_step: int, batch_size: int) -> ReplayedStep:
    """Run the updates after a checkpoint once more, and inspect the last of them, as `fts.loops.replay` does.

    What callbacks did to weights or settings after the checkpoint is not repeated, except for what they do to gradients.

    Args:
        context: as that of the run; its model is given the checkpoint's weights.
        checkpoint: from before the update; verified.
        to_step: the number of the update.
        batch_size: examples in a micro-batch.

    Returns:
        What went in and what came out.

    Raises:
        ArgumentError: the arguments or the data split the examples into other updates than those of the run, or the update is not
            after the checkpoint.
        CheckpointError: the checkpoint is corrupt, or of another model or optimizer.
    """
    run = prepare_run(context, checkpoint, batch_size)
    _check_layout(run, checkpoint)
    context.trainer.state, context.trainer.control = run.trainer_state, TrainerControl()
    with in_train_mode(context.model), neftune_noise(context.model, context.args.neftune_noise_alpha):
        return loops.replay(RunStep(run, CallbackStep(context, run)), run.state, _source(run), checkpoint, to_step)


@attrs.frozen(eq=False)
class RunStep:
    """The step of a run, with what is done around it: settings that a checkpoint keeps, and a torch schedule that steps too."""

    run: Run
    callback_step: CallbackStep

    def __attrs_post_init__(self) -> None:
        self.callback_step.watch(self.callback_step.has_user_callbacks())
        self.callback_step.guard = None  # a replay does not update the model

    @property
    def step(self) -> Any:
        """What computes the update."""
        return self.callback_step.step

    def __call__(self, state: Any, batch: Batch) -> tuple[Any, Metrics]:
        self.callback_step.batch, self.callback_step.state = batch, state
        self.callback_step.begin(StepBegin(Counters(), state, batch))
        after, metrics = self.callback_step.step(state, batch)
        self.callback_step.step.step = self.callback_step.default_step
        self.run.optimizer.after_update(after, int(after.step), metrics)
        return after, metrics

    def check(self, info: Info) -> None:
        """As the step's own `check`."""
        self.callback_step.step.check(info)


def _check_layout(run: Run, checkpoint: Path) -> None:
    old, new = load_epoch_layout(checkpoint), run.epoch_layout
    if old is not None and (old.sizes, old.items, old.seed) != (new.sizes, new.items, new.seed):
        raise ArgumentError(
            f"The updates of {checkpoint} have the layout {old}; these arguments and data give {new}, so that another batch "
            "would be replayed. Make the trainer as that of the run was made."
        )


def _source(run: Run) -> Source:
    """The batches, with the indices of their examples also where an overridden `get_batch_samples` draws them."""
    if run.sampled_source is run.source or run.source.order is None:
        return run.sampled_source
    example_indices = run.source.example_indices
    return attrs.evolve(
        run.sampled_source, order=lambda epoch, start: (example_indices(epoch, batch) or [] for batch in count(start))
    )
