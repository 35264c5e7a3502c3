"""What a loss or gradient that is NaN or infinite does to a run, as the argument `nonfinite` says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import nn

from fts import loops, steps
from fts.errors import ArgumentError
from fts.loops import Position, RolledBack
from fts.state import TrainState
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import export_callbacks, restore_callbacks
from fts.trainer.callbacks.state import TrainerState
from fts.trainer.model.weights import shares_storage, tensors_of
from fts.trainer.run.running_metrics import RunningMetrics

EVERY = 25
"""A run that may roll back keeps a copy of its state every so many updates."""

CHOICES = (
    "TrainingArguments(nonfinite='skip') leaves such updates out, 'rollback' goes back to an earlier state and past the batch, "
    "'ignore' goes on."
)
"""What else can be done, for whoever reads the error."""


LABELS = "All labels of a batch of this step are -100, so that its loss is 0/0: leave such rows out of the data."
"""What is said of a batch without labels that count, such as rows whose answer was truncated away."""


def raising(args: TrainingArguments, step: Any) -> Any:
    """The step, which raises where its loss or gradients are not finite if `nonfinite` is "raise" or "rollback".

    Before the update where that waits for no device, or the run is to roll back; a compiled step, or one whose gradients cannot
    be reached, after it.
    """
    if args.nonfinite not in ("raise", "rollback"):
        return step
    inner = step.step if isinstance(step, steps.WithFullBatch) else step
    at_once = args.device.type == "cpu" or args.nonfinite == "rollback"
    if at_once and isinstance(inner, steps.TrainStep):
        return steps.with_nonfinite_check(step)
    return steps.check_after_step(step, at_once=at_once)


def rolling_back(
    args: TrainingArguments,
    model: nn.Module,
    run: loops.rollback.Run,
    state: TrainState,
    start: Position,
    memory: Remembered | None,
) -> Iterator[loops.Event]:
    """The events of a run, which goes back to an earlier state after a fault where `nonfinite="rollback"` asks for it.

    Args:
        args: `nonfinite_limit`.
        model: has the state's tensors; those of an earlier state are written into it.
        run: `(state, start)` -> the events from there.
        state: the first state.
        start: where in the data to begin.
        memory: is told of each copy of the state; None where the run cannot go back.
    """
    if memory is None:
        return run(state, start)
    there = lambda state, start: run(in_model(state, model), start)  # noqa: E731
    return loops.rolling_back(there, state, start=start, every=EVERY, limit=args.nonfinite_limit, copied=memory.keep)


def in_model(state: TrainState, model: nn.Module) -> TrainState:
    """The state in the tensors of a model, which steps then write: the state itself where it is there."""
    if shares_storage(state, model):
        return state
    state.apply_to(model)
    own = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    return state.replace(params={name: own[name] for name in state.params}, buffers={name: own[name] for name in state.buffers})


def check_can_roll_back(args: TrainingArguments, *, torch_schedule: bool) -> None:
    """Raise ArgumentError where a run cannot go back.

    Args:
        args: `nonfinite`.
        torch_schedule: whether the user's own torch schedule sets the rates.
    """
    if args.nonfinite == "rollback" and torch_schedule:
        raise ArgumentError(
            "nonfinite='rollback' cannot take back the steps of a torch schedule of your own. Use nonfinite='skip', or let "
            "lr_scheduler_type make the schedule."
        )


class Remembered:
    """What a run that may roll back knew at its copies of the state: figures, logs and the states of callbacks.

    Args:
        told: the state that callbacks see; written when the run goes back.
        tally: the figures that are not logged yet; as `told`.
        callbacks: those of the run.
    """

    def __init__(self, told: TrainerState, tally: RunningMetrics, callbacks: list[Any]) -> None:
        self.told, self.tally, self.callbacks = told, tally, callbacks
        self.keep()

    def keep(self) -> None:
        """Remember how things are now."""
        self.kept = copy.deepcopy((self.told, self.tally, export_callbacks(self.callbacks)))

    def reads_at(self, step: int) -> bool:
        """Whether the loop's figures are to be read after this update, so that what is known is that of the copy."""
        return step % EVERY == 0

    def go_back(self, event: RolledBack) -> None:
        """Bring everything back to where it was at the copy."""
        told, tally, callbacks = copy.deepcopy(self.kept)
        for name in [item.name for item in fields(told)]:
            setattr(self.told, name, getattr(told, name))
        for name, value in tally.to_dict().items():
            setattr(self.tally, name, value)
        restore_callbacks(self.callbacks, callbacks)
