"""From `(state, batch)` to `(state, metrics)`: losses, gradient engines, training and evaluation steps."""

from fts.steps.among import Among
from fts.steps.backward import OwnBackward, own_backward
from fts.steps.compiled import CompiledStep, compile
from fts.steps.describing import describe
from fts.steps.donation import donating
from fts.steps.engines import Value
from fts.steps.evaluate import EvalStep, eval_step, module_at
from fts.steps.exchanging import Exchangeable
from fts.steps.finite import FiniteGradients, NonFinite, finite_gradients, nonfinite_in, notice_nonfinite
from fts.steps.gradients import ValueAndGrad, value_and_grad
from fts.steps.losses import ModuleLoss, label_count, loss_in, module_loss, shifts_labels
from fts.steps.microbatches import MicroBatches, Weightless, rows, split
from fts.steps.offloading import offload_activations
from fts.steps.passing import Passing, passing
from fts.steps.precision import Scaler
from fts.steps.reaching import gradients_at, raise_nonfinite
from fts.steps.spreading import gradients_of, spread
from fts.steps.train import Gradients, TrainStep, gradient_step, seeing_gradients, train_step
from fts.steps.updates import apply_gradients

__all__ = [
    "Among",
    "CompiledStep",
    "EvalStep",
    "Exchangeable",
    "FiniteGradients",
    "Gradients",
    "MicroBatches",
    "ModuleLoss",
    "NonFinite",
    "OwnBackward",
    "Passing",
    "Scaler",
    "TrainStep",
    "Value",
    "ValueAndGrad",
    "Weightless",
    "apply_gradients",
    "compile",
    "describe",
    "donating",
    "eval_step",
    "finite_gradients",
    "gradient_step",
    "gradients_at",
    "gradients_of",
    "label_count",
    "loss_in",
    "module_at",
    "module_loss",
    "nonfinite_in",
    "notice_nonfinite",
    "offload_activations",
    "own_backward",
    "passing",
    "raise_nonfinite",
    "rows",
    "seeing_gradients",
    "shifts_labels",
    "split",
    "spread",
    "train_step",
    "value_and_grad",
]
