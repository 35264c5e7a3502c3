"""The step of a run, into which callbacks look, and which they change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from fts import steps, transforms as tx
from fts.errors import CheckpointError
from fts.loops import StepBegin, StepEnd
from fts.steps import MicroBatches
from fts.trainer.model.weights import shares_storage
from fts.trainer.optimization.names import make_transform
from fts.trainer.optimization.optimizer import rewritten
from fts.trainer.optimization.optimizer_proxy import OptimizerProxy
from fts.trainer.run.model_guard import Guard
from fts.trainer.run.nonfinite import raising
from fts.trainer.run.plan import with_settings
from fts.trainer.run.preparation import Run
from fts.typing import Params, Schedule, Transform

if TYPE_CHECKING:
    from fts.trainer.trainer import Trainer


class Stepping:
    """Shows the gradients to callbacks, and exchanges the step for what they write into the optimizer's groups.

    Args:
        trainer: has the callbacks.
        run: the run whose step it is.

    Attributes:
        step: what the loop runs.
        state: the latest state.
    """

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self.trainer = trainer
        self.run = run
        self.state = run.state
        self.batch: Any = None
        self.shows_gradients = False
        self.step = steps.SwappableStep(self._seen(run.step))
        self.lasting = self.step.step
        self.settings: dict[str, Any] = dict(run.written.get("settings", {}))
        self.watched: OptimizerProxy | None = None
        self.guard: Guard | None = None

    def watch(self, guests: bool) -> None:
        """Begin to look at what callbacks do: once, when the run begins.

        Args:
            guests: whether any process has callbacks of the user's.
        """
        self.watched = self._watched_view(guests)
        if guests and self.run.optimizing.engine is None and shares_storage(self.run.state, self.trainer.model):
            self.guard = Guard(self.trainer.model)

    def begin(self, event: StepBegin) -> None:
        """Heed what was done since the last update, callbacks of `on_step_begin` included."""
        if self.guard is not None:
            self.guard.check(event.state)
        if self.watched is not None and (changed := self._changed(self.watched)):
            self._exchange(changed)

    def _changed(self, optimizer: OptimizerProxy) -> dict[int, dict[str, Any]] | None:
        """What callbacks wrote into the optimizer's groups, of several processes in the first one that did."""
        changed, world = optimizer.changed(), self.trainer.world
        if world.size == 1:
            return changed
        if not int(world.sum(torch.tensor(int(bool(changed))))):
            return None
        found: dict[int, dict[str, Any]] = next(filter(None, world.gather(changed)))
        return found

    def end(self, event: StepEnd) -> None:
        """Go back to the step that lasts, and tell callbacks what happened inside the update."""
        self.state = event.state
        self.step.step = self.lasting
        listeners = self.trainer.callback_handler.listeners
        if listeners["on_substep_end"] or listeners["on_pre_optimizer_step"] or listeners["on_optimizer_step"]:
            self._tell_inner()

    def has_guests(self) -> bool:
        """Whether there are callbacks of the user's, which could change anything."""
        callbacks = self.trainer.callback_handler.callbacks
        return any(not type(callback).__module__.startswith(("fts.", "transformers.")) for callback in callbacks)

    def _watched_view(self, guests: bool) -> OptimizerProxy | None:
        """The view of the optimizer, where a callback of the user's could write to it."""
        optimizer = self.run.optimizing.optimizer
        if not isinstance(optimizer, OptimizerProxy):
            return None
        if self.settings:
            self._exchange({})
        for index, changed in self.run.written.get("next", {}).items():
            try:
                optimizer.param_groups[int(index)].update(changed)
            except (ValueError, IndexError) as error:
                raise CheckpointError(
                    f"The checkpoint has settings of the optimizer's group {index!r}; there are {len(optimizer.param_groups)}."
                ) from error
        return optimizer if guests or self.run.written else None

    def _exchange(self, changed: dict[int, dict[str, Any]]) -> Transform | None:
        """Go on with what a callback wrote into the optimizer's groups: a rate for one update, other settings for good.

        Returns:
            The transform of the next update, if it is another one.
        """
        trainer, plan, optimizing = self.trainer, self.run.plan, self.run.optimizing
        filled = [index for index, group in enumerate(optimizing.optimizer.param_groups) if group["params"]]
        lasting, rate = rewritten(changed, filled)
        self.settings |= lasting
        args = with_settings(trainer.args, **self.settings)

        def step_at(schedule: Schedule) -> tuple[Transform, Any]:
            transform = make_transform(args, schedule, trainer.model, total_steps=plan.total_steps)
            return transform, self._seen(trainer.step_of(plan, attrs.evolve(optimizing, transform=transform)))

        transform = None
        if lasting or not changed:
            transform, self.lasting = step_at(plan.schedule)
            self.step.step = self.lasting
        if rate is not None and optimizing.rule is not None:
            tx.followed_rate(self.state.opt_state).fill_(rate)  # the rate of such a run is in its state
        elif rate is not None:
            transform, self.step.step = step_at(tx.constant_schedule(rate))
        optimizing.optimizer.settle()
        return transform

    def written(self) -> dict[str, Any]:
        """What callbacks have written into the groups, for a checkpoint: settings that last, and those of the next update."""
        optimizer = self.run.optimizing.optimizer
        pending = optimizer.changed() if isinstance(optimizer, OptimizerProxy) else None
        return {name: found for name, found in (("settings", self.settings), ("next", pending)) if found}

    def _seen(self, step: Any) -> Any:
        """The step, donating; it shows its gradients where a callback wants them and one that is not compiled has them."""
        listens = self.trainer.callback_handler.listeners["on_pre_optimizer_step"]
        inner = step.step if isinstance(step, steps.WithFullBatch) else step
        self.shows_gradients = bool(listens) and isinstance(inner, steps.TrainStep)
        step = steps.with_donation(step)
        return raising(
            self.trainer.args, steps.with_gradient_callback(step, self._show_gradients) if self.shows_gradients else step
        )

    def _show_gradients(self, grads: Params) -> Transform | None:
        """Put the gradients where torch has them while callbacks look at them, or change them, or settings of this update."""
        parameters = dict(self.trainer.model.named_parameters())
        for name, grad in grads.items():
            parameters[name].grad = grad
        try:
            self._tell_substeps()
            self.trainer.tell("on_pre_optimizer_step")
            for name, grad in grads.items():
                now = parameters[name].grad
                grads[name] = torch.zeros_like(grad) if now is None else now
        finally:
            for name in grads:
                parameters[name].grad = None
        optimizer = self.run.optimizing.optimizer
        changed = optimizer.changed() if isinstance(optimizer, OptimizerProxy) else None
        return self._exchange(changed) if changed else None

    def _tell_inner(self) -> None:
        if not self.shows_gradients:
            self._tell_substeps()
            self.trainer.tell("on_pre_optimizer_step")
        self.trainer.tell("on_optimizer_step")

    def _tell_substeps(self) -> None:
        for _ in range(len(self.batch) - 1 if isinstance(self.batch, MicroBatches) else 0):
            self.trainer.tell("on_substep_end")
