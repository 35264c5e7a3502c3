"""The step of a run, whose gradients callbacks can read, and whose settings they can change."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from fts import steps, transforms as tx
from fts.errors import CheckpointError
from fts.loops import StepBegin, StepEnd
from fts.steps import MicroBatches
from fts.trainer.arguments import with_settings
from fts.trainer.model import shares_storage
from fts.trainer.optimization import OptimizerProxy, make_transform, parse_group_changes
from fts.trainer.run.context import Run, RunContext
from fts.trainer.run.model_guard import ModelGuard
from fts.trainer.run.nonfinite import with_nonfinite_policy
from fts.typing import Params, Schedule, Transform


class CallbackStep:
    """Gives callbacks the gradients, and swaps the step where they write into the optimizer's groups.

    Args:
        context: has the callbacks and the model.
        run: the run whose step it is.

    Attributes:
        step: what the loop runs.
        state: the latest state.
        batch: of the update that runs.
        default_step: the step of the next updates, unless a callback sets the rate of a single one.
        settings: what callbacks wrote into the groups for all later updates, by argument.
        proxy: the optimizer's proxy, where callbacks could write into it.
        guard: checks what callbacks do to the model, where there are callbacks of the user's own.
    """

    def __init__(self, context: RunContext, run: Run) -> None:
        self.context = context
        self.run = run
        self.state = run.state
        self.batch: Any = None
        self.gradient_callback = False
        self.step = steps.SwappableStep(self._observable(run.step))
        self.default_step = self.step.step
        self.settings: dict[str, Any] = dict(run.optimizer_changes.get("settings", {}))
        self.proxy: OptimizerProxy | None = None
        self.guard: ModelGuard | None = None

    def watch(self, user_callbacks: bool) -> None:
        """Begin to check what callbacks do; called once, when the run begins.

        Args:
            user_callbacks: whether any rank has callbacks of the user's own.
        """
        self.proxy = self._writable_proxy(user_callbacks)
        if user_callbacks and self.run.optimizer.engine is None and shares_storage(self.run.state, self.context.model):
            self.guard = ModelGuard(self.context.model)

    def begin(self, event: StepBegin) -> None:
        """Apply what callbacks changed since the last update, those of `on_step_begin` included."""
        if self.guard is not None:
            self.guard.check(event.state)
        if self.proxy is not None and (changed := self._changed(self.proxy)):
            self._swap(changed)

    def _changed(self, optimizer: OptimizerProxy) -> dict[int, dict[str, Any]] | None:
        """What callbacks wrote into the optimizer's groups, on the first rank where they did."""
        changed, world = optimizer.changes(), self.context.world
        if world.size == 1:
            return changed
        if not int(world.all_reduce(torch.tensor(int(bool(changed))))):
            return None
        found: dict[int, dict[str, Any]] = next(filter(None, world.all_gather_object(changed)))
        return found

    def end(self, event: StepEnd) -> None:
        """Restore the default step, and call the events inside an update."""
        self.state = event.state
        self.step.step = self.default_step
        listeners = self.context.callback_handler.listeners
        if listeners["on_substep_end"] or listeners["on_pre_optimizer_step"] or listeners["on_optimizer_step"]:
            self._call_inner_events()

    def has_user_callbacks(self) -> bool:
        """Whether there are callbacks of the user's own, which could change anything."""
        callbacks = self.context.callback_handler.callbacks
        return any(not type(callback).__module__.startswith(("fts.", "transformers.")) for callback in callbacks)

    def _writable_proxy(self, user_callbacks: bool) -> OptimizerProxy | None:
        """The optimizer's proxy, where a callback of the user's own could write into it."""
        optimizer = self.run.optimizer.optimizer
        if not isinstance(optimizer, OptimizerProxy):
            return None
        if self.settings:
            self._swap({})
        for index, changed in self.run.optimizer_changes.get("next", {}).items():
            try:
                optimizer.param_groups[int(index)].update(changed)
            except (ValueError, IndexError) as error:
                raise CheckpointError(
                    f"The checkpoint has settings of the optimizer's group {index!r}; there are {len(optimizer.param_groups)}."
                ) from error
        return optimizer if user_callbacks or self.run.optimizer_changes else None

    def _swap(self, changed: dict[int, dict[str, Any]]) -> Transform | None:
        """Continue with what a callback wrote into the optimizer's groups: a rate for one update, other settings for all.

        Returns:
            The transform of the next update, if it is another one.
        """
        context, plan, optimizer = self.context, self.run.plan, self.run.optimizer
        nonempty = [index for index, group in enumerate(optimizer.optimizer.param_groups) if group["params"]]
        settings, rate = parse_group_changes(changed, nonempty)
        self.settings |= settings
        args = with_settings(context.args, **self.settings)

        def step_at(schedule: Schedule) -> tuple[Transform, Any]:
            transform = make_transform(args, schedule, context.model, total_steps=plan.total_steps)
            return transform, self._observable(context.hooks.make_step(plan, attrs.evolve(optimizer, transform=transform)))

        transform = None
        if settings or not changed:
            transform, self.default_step = step_at(plan.schedule)
            self.step.step = self.default_step
        if rate is not None and optimizer.metric_rule is not None:
            tx.followed_rate(self.state.opt_state).fill_(rate)  # the rate of such a run is in its state
        elif rate is not None:
            transform, self.step.step = step_at(tx.constant_schedule(rate))
        optimizer.optimizer.accept_changes()
        return transform

    def optimizer_changes(self) -> dict[str, Any]:
        """What callbacks have written into the groups, for a checkpoint: settings of all updates, and those of the next one."""
        optimizer = self.run.optimizer.optimizer
        pending = optimizer.changes() if isinstance(optimizer, OptimizerProxy) else None
        return {name: found for name, found in (("settings", self.settings), ("next", pending)) if found}

    def _observable(self, step: Any) -> Any:
        """The step with donation, and with a gradient callback where one listens and the step is not compiled."""
        listeners = self.context.callback_handler.listeners["on_pre_optimizer_step"]
        inner = step.step if isinstance(step, steps.WithFullBatch) else step
        self.gradient_callback = bool(listeners) and isinstance(inner, steps.TrainStep)
        step = steps.with_donation(step)
        if self.gradient_callback:
            step = steps.with_gradient_callback(step, self._on_gradients)
        return with_nonfinite_policy(self.context.args, step)

    def _on_gradients(self, grads: Params) -> Transform | None:
        """Put the gradients into `Parameter.grad` while callbacks read or change them, or settings of this update."""
        parameters = dict(self.context.model.named_parameters())
        for name, grad in grads.items():
            parameters[name].grad = grad
        try:
            self._call_substep_ends()
            self.context.hooks.call_event("on_pre_optimizer_step")
            for name, grad in grads.items():
                now = parameters[name].grad
                grads[name] = torch.zeros_like(grad) if now is None else now
        finally:
            for name in grads:
                parameters[name].grad = None
        optimizer = self.run.optimizer.optimizer
        changed = optimizer.changes() if isinstance(optimizer, OptimizerProxy) else None
        return self._swap(changed) if changed else None

    def _call_inner_events(self) -> None:
        if not self.gradient_callback:
            self._call_substep_ends()
            self.context.hooks.call_event("on_pre_optimizer_step")
        self.context.hooks.call_event("on_optimizer_step")

    def _call_substep_ends(self) -> None:
        for _ in range(len(self.batch) - 1 if isinstance(self.batch, MicroBatches) else 0):
            self.context.hooks.call_event("on_substep_end")
