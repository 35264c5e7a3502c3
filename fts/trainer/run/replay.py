"""A step of a trainer's run, once more."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from fts import loops
from fts.errors import ArgumentError
from fts.loops import Counters, Replayed, Source, StepBegin
from fts.trainer.callbacks.state import TrainerControl
from fts.trainer.checkpoints.resume import cut_of
from fts.trainer.model.preparation import checkpoint_activations, noisy_embeddings, prepared_model
from fts.trainer.model.weights import in_train_mode
from fts.trainer.run.preparation import Run, prepare, saved_batch_size
from fts.trainer.run.stepping import Stepping
from fts.typing import Batch, Info, Metrics

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer


def replay(trainer: Trainer, checkpoint: str | Path, to_step: int) -> Replayed:
    """Run the updates after a checkpoint once more, and look into the last of them, as `fts.loops.replay` does.

    What callbacks did to weights or settings after the checkpoint is not repeated, but for what they do to the gradients.

    Args:
        trainer: made as that of the run; its model is given the checkpoint's weights.
        checkpoint: from before the update.
        to_step: the number of the update.

    Returns:
        What went in and what came out.

    Raises:
        ArgumentError: the arguments or the data cut the rows into other updates than those of the run, or the update is not
            after the checkpoint.
        CheckpointError: the checkpoint is damaged, or of another model or optimizer.
    """
    checkpoint, args = Path(checkpoint), trainer.args
    loops.verify_checkpoint(checkpoint)
    if trainer.model_init is not None:
        trainer.model = trainer.model_wrapped = prepared_model(trainer.call_model_init(), args)
    if args.gradient_checkpointing:
        checkpoint_activations(trainer.model, args.gradient_checkpointing_kwargs)  # type: ignore[arg-type]  # settled
    size = args.auto_find_batch_size and saved_batch_size(checkpoint)
    trainer._train_batch_size = size or args.train_batch_size
    run = prepare(trainer, checkpoint, trainer._train_batch_size)
    _check_cut(run, checkpoint)
    trainer.state, trainer.control = run.told, TrainerControl()
    with in_train_mode(trainer.model), noisy_embeddings(trainer.model, args.neftune_noise_alpha):
        return loops.replay(InRun(run, Stepping(trainer, run)), run.state, _numbered(run), checkpoint, to_step)


@attrs.frozen(eq=False)
class InRun:
    """The step of a run, with what is done around it: settings that a checkpoint keeps, and a torch schedule that steps along."""

    run: Run
    stepping: Stepping

    def __attrs_post_init__(self) -> None:
        self.stepping.watch(self.stepping.has_guests())
        self.stepping.guard = None  # the states of a replay are not those of the model

    @property
    def step(self) -> Any:
        """What computes the update."""
        return self.stepping.step

    def __call__(self, state: Any, batch: Batch) -> tuple[Any, Metrics]:
        self.stepping.batch, self.stepping.state = batch, state
        self.stepping.begin(StepBegin(Counters(), state, batch))
        after, metrics = self.stepping.step(state, batch)
        self.stepping.step.step = self.stepping.lasting
        self.run.optimizing.advance(after, int(after.step), metrics)
        return after, metrics

    def check(self, info: Info) -> None:
        """As the step's own `check`."""
        self.stepping.step.check(info)


def _check_cut(run: Run, checkpoint: Path) -> None:
    old, new = cut_of(checkpoint), run.cut
    if old is not None and (old.sizes, old.items, old.seed) != (new.sizes, new.items, new.seed):
        raise ArgumentError(
            f"The updates of {checkpoint} were cut as {old}; these arguments and data cut them as {new}, so that another batch "
            "would be replayed. Make the trainer as that of the run was made."
        )


def _numbered(run: Run) -> Source:
    """The batches, which tell their items also where a `get_batch_samples` of the user's draws them."""
    if run.drawn is run.source or run.source.order is None:
        return run.drawn
    items = run.source.items
    return attrs.evolve(run.drawn, order=lambda epoch, start: (items(epoch, batch) or [] for batch in count(start)))
