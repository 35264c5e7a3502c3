"""The events of a run, as the methods of a callback."""

from __future__ import annotations

from typing import Any

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
    "on_prediction_step",
    "on_predict",
    "on_push_begin",
)
"""The methods that a callback may have."""

BASE_MODULES = ("fts.trainer.callbacks.base", "transformers.trainer_callback")
"""The modules of the base classes with empty methods; transformers' is known by its name, and never imported."""


class TrainerCallback:
    """A base for callbacks: override the events that you need.

    Each event is called as `on_...(args, state, control, **kwargs)`, where kwargs has `model`, `processing_class`, `optimizer`,
    `lr_scheduler`, `train_dataloader` and `eval_dataloader`, and:

    - in `on_step_end` `metrics`: those of the update by name, as 0-d tensors on the device (`loss`, `grad_norm`, and what the
      loss function returned with its loss). Reading one, as `float(metrics["loss"])` does, waits for the device; a metric that
      is stored is better read later.
    - in `on_log` `logs`: the logged metrics, as Python numbers, averaged over the updates since the last log.
    - in `on_evaluate` and `on_predict` `metrics`: those of the evaluation or prediction, as Python numbers.

    To request an action, set a flag of `control`; an event may also return another control object, which then replaces it.
    In one update, forward, backward and the optimizer are a single step. `on_pre_optimizer_step` is called inside it, where it
    is not compiled: each Parameter's `.grad` then has the gradient of the update, before clipping, and in-place changes to it
    are used. `on_optimizer_step` is called right after the update; `on_substep_end`, for all micro-batches but the
    last, before both. An event that is not overridden costs nothing.
    An exception in an event ends the run as a `CallbackError` that names the callback, the event and the step. The state of a
    callback that also derives from `ExportableState` is saved in checkpoints. Callbacks written for transformers work unchanged.
    Checkpoints are written asynchronously; `on_save` waits until the new one is complete, unless the callback declares with
    `reads_checkpoints = False` that it does not read it.

    >>> class Stop(TrainerCallback):
    ...     def on_step_end(self, args, state, control, **kwargs):
    ...         control.should_training_stop = state.global_step == 2
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The Trainer was created."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training begins."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training ends."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A pass over the data begins."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A pass over the data ends."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An update begins."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A micro-batch that is not the last of its update is done."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The gradients are computed."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The parameters are updated."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An update is done; kwargs has its `metrics` as tensors."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An evaluation is done; kwargs has its `metrics`."""

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A prediction is done; kwargs has its `metrics`."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A checkpoint is written."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Metrics were logged; kwargs has them as `logs`."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A batch of evaluation or prediction is done."""

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An upload begins."""


def overrides(callback: Any, event: str) -> bool:
    """Whether a callback overrides the method of an event.

    >>> overrides(TrainerCallback(), "on_log"), overrides(object(), "on_log")
    (False, False)
    """
    method = getattr(callback, event, None)
    inherited = (
        getattr(method, "__qualname__", "") == f"TrainerCallback.{event}" and getattr(method, "__module__", "") in BASE_MODULES
    )
    return method is not None and not inherited
