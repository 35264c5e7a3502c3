"""The model of a run: preparation, train and eval mode, weights, and the loss of a micro-batch.

It may use `fts.trainer.data` and `fts.trainer.arguments`.
"""

from fts.trainer.model.float8 import check_float8
from fts.trainer.model.label_counts import (
    accepts_loss_kwargs,
    all_labels_ignored,
    count_labels,
    counts_shifted_labels,
    loss_denominator,
)
from fts.trainer.model.loss import (
    LossConfig,
    UpdateTotals,
    compute_loss,
    compute_loss_fn,
    loss_weight_fn,
    micro_batch_loss,
    resolve_label_smoothing,
)
from fts.trainer.model.modes import evaluation_mode, in_train_mode
from fts.trainer.model.preparation import (
    accepts_trial,
    call_model_init,
    debug_overflow,
    enable_gradient_checkpointing,
    neftune_noise,
    prepare_model,
)
from fts.trainer.model.weights import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    apply_eval_params,
    has_only_adapters,
    load_weights,
    named_tensors,
    shares_storage,
    swap_eval_params,
)

__all__ = [
    "ADAPTER_SAFE_WEIGHTS_NAME",
    "LossConfig",
    "UpdateTotals",
    "accepts_loss_kwargs",
    "accepts_trial",
    "all_labels_ignored",
    "apply_eval_params",
    "call_model_init",
    "check_float8",
    "compute_loss",
    "compute_loss_fn",
    "count_labels",
    "counts_shifted_labels",
    "debug_overflow",
    "enable_gradient_checkpointing",
    "evaluation_mode",
    "has_only_adapters",
    "in_train_mode",
    "load_weights",
    "loss_denominator",
    "loss_weight_fn",
    "micro_batch_loss",
    "named_tensors",
    "neftune_noise",
    "prepare_model",
    "resolve_label_smoothing",
    "shares_storage",
    "swap_eval_params",
]
