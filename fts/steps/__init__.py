"""From `(state, batch)` to `(state, metrics)`: losses, gradient engines, training and evaluation steps."""

from fts.steps.backward import OwnBackward, own_backward
from fts.steps.compiled import CompiledStep, compile
from fts.steps.describing import describe
from fts.steps.donation import donating
from fts.steps.engines import Value
from fts.steps.evaluate import EvalStep, eval_step, module_at
from fts.steps.exchanging import Exchangeable
from fts.steps.gradients import ValueAndGrad, value_and_grad
from fts.steps.losses import ModuleLoss, label_count, loss_in, module_loss, shifts_labels
from fts.steps.microbatches import MicroBatches, rows, split
from fts.steps.passing import passing
from fts.steps.train import Gradients, TrainStep, gradient_step, train_step
from fts.steps.updates import apply_gradients

__all__ = [
    "CompiledStep",
    "EvalStep",
    "Exchangeable",
    "Gradients",
    "MicroBatches",
    "ModuleLoss",
    "OwnBackward",
    "TrainStep",
    "Value",
    "ValueAndGrad",
    "apply_gradients",
    "compile",
    "describe",
    "donating",
    "eval_step",
    "gradient_step",
    "label_count",
    "loss_in",
    "module_at",
    "module_loss",
    "own_backward",
    "passing",
    "rows",
    "shifts_labels",
    "split",
    "train_step",
    "value_and_grad",
]
