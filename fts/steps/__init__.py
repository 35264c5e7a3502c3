"""From `(state, batch)` to `(state, metrics)`: losses, gradient engines, training and evaluation steps."""

from fts.steps.activation_offloading import offload_activations
from fts.steps.batch_context import WithFullBatch, with_full_batch
from fts.steps.collective_step import find_gradient_fn, with_collectives
from fts.steps.collectives import Collectives
from fts.steps.compiled_step import CompiledStep, compile
from fts.steps.description import describe
from fts.steps.donation import with_donation
from fts.steps.engines import LossAux
from fts.steps.eval_step import EvalStep, eval_module, eval_step
from fts.steps.gradients import ValueAndGrad, value_and_grad
from fts.steps.inspection import compute_gradients, with_nonfinite_check
from fts.steps.losses import ModuleLoss, extract_loss, module_loss, num_label_tokens, shifts_labels
from fts.steps.manual_backward import ManualBackward, manual_backward
from fts.steps.microbatches import MicroBatches, PaddingBatch, batch_size_of, split_microbatches
from fts.steps.nonfinite import CheckedGradients, NonFiniteCounts, check_after_step, find_nonfinite, raise_if_nonfinite
from fts.steps.precision import LossScaler
from fts.steps.swappable import SwappableStep
from fts.steps.train_step import GradientFn, TrainStep, gradient_step, train_step, with_gradient_callback
from fts.steps.updates import apply_gradients

__all__ = [
    "CheckedGradients",
    "Collectives",
    "CompiledStep",
    "EvalStep",
    "GradientFn",
    "LossAux",
    "LossScaler",
    "ManualBackward",
    "MicroBatches",
    "ModuleLoss",
    "NonFiniteCounts",
    "PaddingBatch",
    "SwappableStep",
    "TrainStep",
    "ValueAndGrad",
    "WithFullBatch",
    "apply_gradients",
    "batch_size_of",
    "check_after_step",
    "compile",
    "compute_gradients",
    "describe",
    "eval_module",
    "eval_step",
    "extract_loss",
    "find_gradient_fn",
    "find_nonfinite",
    "gradient_step",
    "manual_backward",
    "module_loss",
    "num_label_tokens",
    "offload_activations",
    "raise_if_nonfinite",
    "shifts_labels",
    "split_microbatches",
    "train_step",
    "value_and_grad",
    "with_collectives",
    "with_donation",
    "with_full_batch",
    "with_gradient_callback",
    "with_nonfinite_check",
]
