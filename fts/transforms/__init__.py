"""Gradients -> updates: small pure transforms, to be chained.

>>> import torch
>>> from fts import transforms as tx
>>> optimizer = tx.chain(tx.clip_by_global_norm(1.0), tx.sgd(0.5))
>>> params = {"w": torch.tensor([1.0, 1.0])}
>>> updates, state, info = optimizer.update({"w": torch.tensor([3.0, 4.0])}, optimizer.init(params), params)
>>> tx.apply_updates(params, updates)
{'w': tensor([0.7000, 0.6000])}
"""

from fts.transforms._torch_transform import TorchState
from fts.transforms.adam import AdamState, adam, adamw, scale_by_adam
from fts.transforms.averaging import EmaState, averaged_params, ema_params
from fts.transforms.clipping import adaptive_clip, clip_by_block_rms, clip_by_global_norm, clip_by_value, global_norm
from fts.transforms.combining import apply_updates, chain, identity
from fts.transforms.loss_scaling import LossScaleState, dynamic_loss_scale, loss_scale
from fts.transforms.low_precision import MasterState, RoundingState, master_weights, stochastic_rounding
from fts.transforms.masking import masked, partition
from fts.transforms.momentum import SgdState, TraceState, sgd, trace
from fts.transforms.noise import add_noise, centralize
from fts.transforms.optimizers import FusedKernel, OptimizerState, optimizer
from fts.transforms.plateau import (
    FollowState,
    Greedy,
    Plateau,
    RateRule,
    followed_rate,
    reduce_on_plateau,
    steps_on_metric,
    update_on_metric,
)
from fts.transforms.rules import bias_correction, elementwise, per_tensor
from fts.transforms.scaling import (
    ScheduleState,
    add_decayed_weights,
    scale,
    scale_by_learning_rate,
    scale_by_schedule,
    set_to_zero,
)
from fts.transforms.schedules import (
    constant_schedule,
    cosine_restarts_schedule,
    cosine_schedule,
    inverse_sqrt_schedule,
    join_schedules,
    linear_schedule,
    polynomial_schedule,
    shift_schedule,
    warmup,
    warmup_stable_decay_schedule,
)
from fts.transforms.spikes import SpikeState, skip_spikes
from fts.transforms.to_torch_state import torch_moments
from fts.transforms.torch_optimizers import eval_params, from_torch
from fts.transforms.wrappers import MultiStepsState, SkipState, multi_steps, skip_nonfinite

__all__ = [
    "AdamState",
    "EmaState",
    "FollowState",
    "FusedKernel",
    "Greedy",
    "LossScaleState",
    "MasterState",
    "MultiStepsState",
    "OptimizerState",
    "Plateau",
    "RateRule",
    "RoundingState",
    "ScheduleState",
    "SgdState",
    "SkipState",
    "SpikeState",
    "TorchState",
    "TraceState",
    "adam",
    "adamw",
    "adaptive_clip",
    "add_decayed_weights",
    "add_noise",
    "apply_updates",
    "averaged_params",
    "bias_correction",
    "centralize",
    "chain",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_value",
    "constant_schedule",
    "cosine_restarts_schedule",
    "cosine_schedule",
    "dynamic_loss_scale",
    "elementwise",
    "ema_params",
    "eval_params",
    "followed_rate",
    "from_torch",
    "global_norm",
    "identity",
    "inverse_sqrt_schedule",
    "join_schedules",
    "linear_schedule",
    "loss_scale",
    "masked",
    "master_weights",
    "multi_steps",
    "optimizer",
    "partition",
    "per_tensor",
    "polynomial_schedule",
    "reduce_on_plateau",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "set_to_zero",
    "sgd",
    "shift_schedule",
    "skip_nonfinite",
    "skip_spikes",
    "steps_on_metric",
    "stochastic_rounding",
    "torch_moments",
    "trace",
    "update_on_metric",
    "warmup",
    "warmup_stable_decay_schedule",
]
