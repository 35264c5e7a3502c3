"""What a run is given by its Trainer, and what it starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs
from torch import nn

from fts import loops
from fts.distributed import Group
from fts.loops import Position, Source
from fts.loops.preemption import StopRequest
from fts.state import TrainState
from fts.trainer.arguments import Plan, TrainingArguments
from fts.trainer.callbacks import CallbackHandler, TrainerControl, TrainerState
from fts.trainer.checkpoints import EpochLayout
from fts.trainer.optimization import RunOptimizer
from fts.trainer.reporting import RunningMetrics


class TrainerProtocol(Protocol):
    """The members of a Trainer that a run looks up each time, because a script may assign or override them meanwhile."""

    state: TrainerState
    control: TrainerControl
    request: StopRequest | None
    optimizer: Any
    lr_scheduler: Any

    @property
    def evaluate(self) -> Callable[..., dict[str, float]]:
        """Evaluate, log the metrics, and return them."""

    @property
    def log(self) -> Callable[..., None]:
        """Log metrics."""


@attrs.frozen(eq=False)
class Hooks:
    """The methods of a Trainer that a run calls, bound to it.

    Attributes:
        call_event: `(event, **kwargs)`: calls the callbacks, which may set `control`.
        train_source: from a seed to the batches of training.
        make_optimizer: from a plan to what updates the weights.
        start_engine: starts DeepSpeed's engine where the arguments ask for it; otherwise returns its second argument.
        make_step: from a plan and what updates the weights to the step.
        after_save: makes what is called when a checkpoint is durable.
        push_at_end: uploads the model at the end, if it is to be.
        total_train_batch_size: examples in an update, over all ranks.
        num_trainable_parameters: how many numbers are trained.
        get_batch_samples: this and the following ones are None where they are not overridden.
        set_initial_training_values: decides on epochs, examples and updates.
        num_examples: from a loader to the number of its examples.
        floating_point_ops: from a batch to the operations of a forward and backward pass.
        save_model: writes the model to a directory, without an upload.
        report_evaluation: gets the metrics of an evaluation and its step; returns whether to stop the run.
    """

    call_event: Callable[..., None]
    train_source: Callable[[int], Source]
    make_optimizer: Callable[[Plan], RunOptimizer]
    start_engine: Callable[[Plan, RunOptimizer], RunOptimizer]
    make_step: Callable[[Plan, RunOptimizer], Any]
    after_save: Callable[[loops.AsyncCheckpointer, Path, Callable[[], object]], Callable[[], object]]
    push_at_end: Callable[[], None]
    total_train_batch_size: Callable[[], int]
    num_trainable_parameters: Callable[[], int]
    get_batch_samples: Callable[..., Any] | None = None
    set_initial_training_values: Callable[..., Any] | None = None
    num_examples: Callable[[Any], int] | None = None
    floating_point_ops: Callable[[Any], Any] | None = None
    save_model: Callable[[str], Any] | None = None
    report_evaluation: Callable[[dict[str, float], int], bool] | None = None


@attrs.frozen(eq=False)
class RunContext:
    """What a run is given.

    Attributes:
        trainer: its state, control flags, and the methods that a script may assign.
        hooks: what the run calls.
        args: the settings.
        model: is trained in place.
        callback_handler: has the callbacks, and the loader of training.
        processing_class: a tokenizer or processor.
        label_names: the names of labels in a batch.
        group: the ranks that have batches of their own.
        world: all ranks.
        start_time: when `train` was called, on the clock of `time.monotonic`.
        memory_metrics: returns what the run did to the memory.
    """

    trainer: TrainerProtocol
    hooks: Hooks
    args: TrainingArguments
    model: nn.Module
    callback_handler: CallbackHandler
    processing_class: Any
    label_names: list[str]
    group: Group
    world: Group
    start_time: float
    memory_metrics: Callable[[], Mapping[str, float]] = dict


@attrs.frozen(eq=False)
class Run:
    """What a run starts from.

    Attributes:
        plan: the resolved arguments.
        optimizer: what updates the weights.
        step: `(state, batch) -> (state, metrics)`.
        state: the core's state; its tensors are those of the model.
        source: the batches.
        sampled_source: the same, or what an overridden `get_batch_samples` makes of them.
        epoch_layout: how the examples of an epoch are split into updates.
        start: where in the batches to begin.
        trainer_state: the state that callbacks get.
        running_metrics: metrics that were read before the checkpoint, but not logged.
        optimizer_changes: what callbacks had written into the optimizer's groups: for all updates, and for the next one.
        evaluation_pending: whether an evaluation was due at the step of the checkpoint, and the run was asked to stop before it.
    """

    plan: Plan
    optimizer: RunOptimizer
    step: Any
    state: TrainState
    source: Source
    sampled_source: Source
    epoch_layout: EpochLayout
    start: Position
    trainer_state: TrainerState
    running_metrics: RunningMetrics
    optimizer_changes: dict[str, Any] = attrs.Factory(dict)
    evaluation_pending: bool = False
