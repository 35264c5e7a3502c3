"""When to log, evaluate, save and stop, by the arguments."""

from __future__ import annotations

from typing import Any

from fts.trainer.arguments import IntervalStrategy, SaveStrategy
from fts.trainer.callbacks.base import TrainerCallback


class DefaultFlowCallback(TrainerCallback):
    """Requests logs, evaluations, checkpoints and the end of training by the arguments."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Request what is due by steps, and the end of training."""
        step = state.global_step
        last = step >= state.max_steps
        if args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0:
            control.should_log = True
        if step == 1 and args.logging_first_step:
            control.should_log = True
        if args.eval_strategy == IntervalStrategy.STEPS and step >= _delay(args) and (last or step % state.eval_steps == 0):
            control.should_evaluate = True
        if args.save_strategy == SaveStrategy.STEPS and (last or (state.save_steps > 0 and step % state.save_steps == 0)):
            control.should_save = True
        if last:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Request what is due by epochs."""
        if args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True
        if args.eval_strategy == IntervalStrategy.EPOCH and state.epoch >= _delay(args):
            control.should_evaluate = True
        if args.save_strategy == SaveStrategy.EPOCH:
            control.should_save = True


def _delay(args: Any) -> float:
    """Steps or epochs, as in `eval_strategy`, before the first evaluation."""
    return float(getattr(args, "eval_delay", None) or 0)
