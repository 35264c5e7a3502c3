"""The transform that the arguments name: clipping, and the optimizer of `optim`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fts import transforms as tx
from fts.trainer.arguments import OptimizerNames, TrainingArguments
from fts.trainer.optimization.optimizer_classes import optimizer_and_groups
from fts.trainer.optimization.parameter_groups import decay_parameter_names
from fts.trainer.optimization.schedules import make_metric_rule
from fts.trainer.optimization.third_party import OptimArgs
from fts.transforms.loss_scaling import unscales
from fts.typing import Schedule, Transform


def make_transform(args: TrainingArguments, schedule: Schedule, model: nn.Module, *, total_steps: int) -> Transform:
    """The optimizer of a run: clipping, then what `optim` names.

    AdamW and SGD are fts's own; all others are the torch optimizers of their packages, run by `tx.from_torch`.

    Args:
        args: as for `optimizer_cls_and_kwargs`, and `max_grad_norm` (0 only reports the norm) and `lr_scheduler_type`.
        schedule: the learning rate by update; not used where a metric decides it (`make_metric_rule`).
        model: its trained parameters, of which some decay.
        total_steps: updates in the run.

    Returns:
        A transform. It reports `grad_norm` and `lr`, the rate of the update.

    Raises:
        MissingDependencyError: the package or the hardware that the optimizer needs is absent.
        ArgumentError: the optimizer cannot be a transform, or its options cannot be used.

    >>> args = TrainingArguments(max_grad_norm=0.5)
    >>> make_transform(args, tx.constant_schedule(0.1), nn.Linear(2, 2), total_steps=9).children[1].label
    'adamw(lr=constant_schedule(0.1), weight_decay=0.0)'
    """
    make = _transform_factory(args, model, total_steps)
    rule = make_metric_rule(args)
    descent = make(schedule) if rule is None else tx.reduce_on_plateau(make, args.learning_rate, rule)
    return with_clipping(args, descent)


def with_clipping(args: TrainingArguments, descent: Transform) -> Transform:
    """A transform behind clipping to `max_grad_norm` (0 only reports the norm), and `with_update_skipping`."""
    return with_update_skipping(args, tx.chain(tx.clip_by_global_norm(args.max_grad_norm or float("inf")), descent))


def with_update_skipping(args: TrainingArguments, transform: Transform) -> Transform:
    """A transform that skips updates of gradients which are not finite, where `nonfinite="skip"` or `fp16` asks for it.

    In float16 the loss is scaled, and what overflows by the scale is skipped in any case.
    """
    if args.mixed_precision == "fp16":
        return transform if unscales(transform) else tx.dynamic_loss_scale(transform)
    return tx.skip_nonfinite(transform, args.nonfinite_limit) if args.nonfinite == "skip" else transform


def _transform_factory(args: TrainingArguments, model: nn.Module, total_steps: int) -> Callable[[Any], Transform]:
    """A function from a rate (a schedule, a number or a 0-d tensor) to the transform behind the clipping."""
    name = OptimizerNames(args.optim)
    cls, groups, kwargs = optimizer_and_groups(args, model, total_steps=total_steps)
    if "weight_decay" in OptimArgs.of(args).texts:
        warnings.warn(
            "optim_args: weight_decay has no effect, as in transformers: each group of parameters carries that of "
            f"TrainingArguments(weight_decay={args.weight_decay}). Set it there.",
            stacklevel=4,
        )
    if name in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        return partial(_adamw, args, decay_parameter_names(model) if args.weight_decay else None)
    if name == OptimizerNames.SGD:
        own = {key: value for key, value in kwargs.items() if key not in ("lr", "weight_decay")}
        return partial(_sgd, args, decay_parameter_names(model), own)
    return partial(_from_torch_class, cls, groups, kwargs, args.learning_rate)


def _adamw(args: TrainingArguments, decayed: frozenset[str] | None, rate: Any) -> Transform:
    betas = {"b1": args.adam_beta1, "b2": args.adam_beta2, "eps": args.adam_epsilon}
    return tx.adamw(rate, **betas, weight_decay=args.weight_decay, mask=decayed)


def _sgd(args: TrainingArguments, decayed: frozenset[str], options: dict[str, Any], rate: Any) -> Transform:
    descent = tx.sgd(rate, **options)
    return tx.chain(tx.add_decayed_weights(args.weight_decay, mask=decayed), descent) if args.weight_decay else descent


def _from_torch_class(cls: Any, groups: list[dict[str, Any]], kwargs: dict[str, Any], peak: float, rate: Any) -> Transform:
    """A torch optimizer whose groups all have the rate `peak`; the rate in use comes as a factor on it."""

    def factor(step: Any) -> Any:
        value = rate(step) if callable(rate) else float(rate)
        return value / peak if peak else 0.0

    return tx.from_torch(cls, groups=groups, schedule=factor, **kwargs)
