"""What a loss or gradient that is NaN or infinite does to a run, as the argument `nonfinite` says."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import nn

from fts import loops, steps
from fts.loops import Position
from fts.state import TrainState
from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import TrainerState, export_callbacks, restore_callbacks
from fts.trainer.model import named_tensors, shares_storage
from fts.trainer.reporting import RunningMetrics

COPY_INTERVAL = 25
"""A run that may roll back keeps a copy of its state every so many updates."""

CHOICES = (
    "TrainingArguments(nonfinite='skip') leaves such updates out, 'rollback' goes back to an earlier state and past the batch, "
    "'ignore' continues."
)
"""What else can be done, as a note of the error."""

LABELS = "All labels of a batch of this step are -100, so that its loss is 0/0: leave such examples out of the data."
"""A note about a batch without labels that count, such as examples whose answer was truncated away."""


def with_nonfinite_policy(args: TrainingArguments, step: Any) -> Any:
    """The step, which raises where its loss or gradients are not finite if `nonfinite` is "raise" or "rollback".

    It raises before the update where that does not wait for a device, or the run is to roll back; and after it where the step is
    compiled, or its gradients are not available.
    """
    if args.nonfinite not in ("raise", "rollback"):
        return step
    inner = step.step if isinstance(step, steps.WithFullBatch) else step
    at_once = args.device.type == "cpu" or args.nonfinite == "rollback"
    if at_once and isinstance(inner, steps.TrainStep):
        return steps.with_nonfinite_check(step)
    return steps.check_after_step(step, blocking=at_once)


def with_rollback(
    args: TrainingArguments,
    model: nn.Module,
    run: loops.rollback.Run,
    state: TrainState,
    start: Position,
    snapshot: RollbackSnapshot | None,
) -> Iterator[loops.Event]:
    """The events of a run, which rolls back to an earlier state after a fault where `nonfinite="rollback"` asks for it.

    Args:
        args: `nonfinite_limit`.
        model: has the state's tensors; those of an earlier state are written into it.
        run: `(state, start)` -> the events from there.
        state: the first state.
        start: where in the data to begin.
        snapshot: is taken with each copy of the state; None where the run does not roll back.
    """
    if snapshot is None:
        return run(state, start)
    run_in_model = lambda state, start: run(in_model(state, model), start)  # noqa: E731
    policy = loops.RollbackPolicy(COPY_INTERVAL, args.nonfinite_limit, on_copy=snapshot.take)
    return loops.with_rollback(run_in_model, state, policy, start=start)


def in_model(state: TrainState, model: nn.Module) -> TrainState:
    """The state in the tensors of a model, which steps then write; the state itself where it shares them already."""
    if shares_storage(state, model):
        return state
    state.apply_to(model)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    return state.replace(
        params={name: tensors[name] for name in state.params}, buffers={name: tensors[name] for name in state.buffers}
    )


class RollbackSnapshot:
    """What belongs to a run's last copy of its state: metrics, logs and the states of callbacks.

    Args:
        trainer_state: the state that callbacks get; written when the run rolls back.
        running_metrics: metrics that are not logged yet; written likewise.
        callbacks: those of the run.
    """

    def __init__(self, trainer_state: TrainerState, running_metrics: RunningMetrics, callbacks: list[Any]) -> None:
        self.trainer_state, self.running_metrics, self.callbacks = trainer_state, running_metrics, callbacks
        self.take()

    def take(self) -> None:
        """Copy what there is now."""
        self.copied = copy.deepcopy((self.trainer_state, self.running_metrics, export_callbacks(self.callbacks)))

    def is_due(self, step: int) -> bool:
        """Whether a copy is made after this update, for which the loop's metrics are to be read first."""
        return step % COPY_INTERVAL == 0

    def restore(self) -> None:
        """Bring everything back to where it was at the copy."""
        trainer_state, running_metrics, callbacks = copy.deepcopy(self.copied)
        for name in [field.name for field in fields(trainer_state)]:
            setattr(self.trainer_state, name, getattr(trainer_state, name))
        for name, value in running_metrics.to_dict().items():
            setattr(self.running_metrics, name, value)
        restore_callbacks(self.callbacks, callbacks)
