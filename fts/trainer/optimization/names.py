"""From `optim`, `optim_args` and `optim_target_modules` to a transform."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fts import transforms as tx
from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments
from fts.trainer.arguments.choices import OptimizerNames
from fts.trainer.optimization import packages
from fts.trainer.optimization.low_rank import target_groups
from fts.trainer.optimization.packages import Options
from fts.trainer.optimization.schedules import make_rate_rule
from fts.transforms.loss_scaling import unscales
from fts.typing import Schedule, Transform

_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")


def decayed_names(model: nn.Module) -> frozenset[str]:
    """The trained parameters that weight decay applies to: all but biases and the weights of normalisation layers.

    Args:
        model: layers that are an `nn.LayerNorm`, or whose path says that they are a norm, count as normalisation.

    Returns:
        Names of parameters.

    >>> sorted(decayed_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    ['0.weight']
    """
    norms = {
        f"{path}.{name}"
        for path, child in model.named_modules(remove_duplicate=False)
        if path and isinstance(child, nn.LayerNorm)
        for name, _ in child.named_parameters()
    }
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in norms and not _UNDECAYED.search(name.lower())
    )


def parameter_groups(args: TrainingArguments, model: nn.Module, decayed: Collection[str] | None = None) -> list[dict[str, Any]]:
    """The trained parameters in two groups: those that decay, then the others.

    Args:
        args: `weight_decay`.
        model: its parameters with `requires_grad`.
        decayed: the names of those that decay; None: `decayed_names`.

    Returns:
        `[{"params": names, "weight_decay": number}, ...]`, with the names in the model's order.

    >>> parameter_groups(TrainingArguments(weight_decay=0.1), nn.Linear(2, 2))
    [{'params': ['weight'], 'weight_decay': 0.1}, {'params': ['bias'], 'weight_decay': 0.0}]
    """
    decayed = decayed_names(model) if decayed is None else decayed
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [name for name in trained if name in decayed], "weight_decay": args.weight_decay},
        {"params": [name for name in trained if name not in decayed], "weight_decay": 0.0},
    ]


def with_parameters(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """The same groups, with a model's Parameters in the place of their names, as torch's optimizers take them."""
    named = dict(model.named_parameters())
    return [{**group, "params": [named[name] for name in group["params"]]} for group in groups]


def optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """The torch optimizer that `optim` names and its options, as transformers' Trainer makes it.

    Args:
        args: `optim`, `optim_args`, `optim_target_modules`, `learning_rate`, `weight_decay` and those of Adam.
        model: is needed by GaLore and APOLLO, whose options hold "params", and by LOMO, whose options hold "model".

    Returns:
        A class and the keyword arguments beside the parameters. `weight_decay` of the groups (`parameter_groups`) comes first.

    Raises:
        MissingDependencyError: the package or the hardware that the optimizer needs is absent.
        ArgumentError: `optim_args` cannot be read or has a key that the optimizer does not take; or the optimizer needs a model
            or `optim_target_modules`.

    >>> cls, kwargs = optimizer_cls_and_kwargs(TrainingArguments(optim="sgd", optim_args="momentum=0.9"))
    >>> cls.__name__, kwargs
    ('SGD', {'lr': 5e-05, 'momentum': 0.9})
    """
    name = OptimizerNames(args.optim)
    if name.endswith("_layerwise"):
        raise ArgumentError(
            f"optim='{name}' updates each layer inside the backward pass, so that no step ever has all gradients: they cannot be "
            f"clipped, accumulated or given to a transform. Use optim='{name.removesuffix('_layerwise')}', with the same options."
        )
    cls, kwargs = _MAKERS[name](args, Options.of(args))
    if name in _LOW_RANK:
        if model is None:
            raise ArgumentError(f"optim='{name}' needs the model, whose linear layers it projects.")
        kwargs["params"] = with_parameters(target_groups(args, model, kwargs.pop("target")), model)
    if name in _FUSED_BACKWARD:
        if model is None:
            raise ArgumentError(f"optim='{name}' needs the model, on which it puts its hooks.")
        kwargs["model"] = model
    return cls, {"lr": args.learning_rate, **kwargs}


def make_transform(args: TrainingArguments, schedule: Schedule, model: nn.Module, *, total_steps: int) -> Transform:
    """The optimizer of a run: clipping, then what `optim` names.

    AdamW and SGD are fts's own; all others are the torch optimizers of their packages, run by `tx.from_torch`.

    Args:
        args: as for `optimizer_cls_and_kwargs`, and `max_grad_norm` (0 only reports the norm) and `lr_scheduler_type`.
        schedule: the learning rate by update; not used where a metric decides on it (`make_rate_rule`).
        model: tells the names of the trained parameters and which of them decay.
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
    make = _maker(args, model, total_steps)
    rule = make_rate_rule(args)
    descent = make(schedule) if rule is None else tx.reduce_on_plateau(make, args.learning_rate, rule)
    return guarded(args, descent)


def guarded(args: TrainingArguments, descent: Transform) -> Transform:
    """A transform behind clipping to `max_grad_norm` (0 only reports the norm), and `withholding`."""
    return withholding(args, tx.chain(tx.clip_by_global_norm(args.max_grad_norm or float("inf")), descent))


def withholding(args: TrainingArguments, transform: Transform) -> Transform:
    """A transform that skips updates of gradients which are not finite, where `nonfinite="skip"` or `fp16` asks for it.

    In float16 the loss is scaled, and what overflows by the scale is skipped in any case.
    """
    if args.mixed_precision == "fp16":
        return transform if unscales(transform) else tx.dynamic_loss_scale(transform)
    return tx.skip_nonfinite(transform, args.nonfinite_limit) if args.nonfinite == "skip" else transform


def optimizer_and_groups(
    args: TrainingArguments, model: nn.Module, *, total_steps: int | None = None
) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """What `make_transform` and a view of it are made of.

    Args:
        args: as for `optimizer_cls_and_kwargs`.
        model: tells the names of the trained parameters and which of them decay.
        total_steps: updates in the run, if they are known; a warm-up may be a share of them.

    Returns:
        A class of torch optimizers whose state is plain, its groups `[{"params": names, **options}, ...]`, and its options.

    Raises:
        MissingDependencyError: the package or the hardware that the optimizer needs is absent.
        ArgumentError: the optimizer cannot be a transform, or its options cannot be used.

    >>> cls, groups, kwargs = optimizer_and_groups(TrainingArguments(optim="adagrad", weight_decay=0.1), nn.Linear(2, 2))
    >>> cls.__name__, groups[0], kwargs
    ('Adagrad', {'params': ['weight'], 'weight_decay': 0.1}, {'lr': 5e-05})
    """
    name = OptimizerNames(args.optim)
    if name in _FUSED_BACKWARD:
        raise ArgumentError(
            f"optim='{name}' writes the weights inside the backward pass and never holds all gradients, so it cannot be a "
            "transform of gradients. To save the memory of moments use optim='adafactor', 'adamw_8bit' or 'galore_adamw'."
        )
    cls, kwargs = optimizer_cls_and_kwargs(args, model if name in _LOW_RANK else None)
    if "warmup_steps" in kwargs and total_steps is not None:
        kwargs["warmup_steps"] = args.get_warmup_steps(total_steps)  # a share of all is not known before
    return packages.adapted(cls), _groups(args, model, kwargs), kwargs


def _maker(args: TrainingArguments, model: nn.Module, total_steps: int) -> Callable[[Any], Transform]:
    """A function from a rate (a schedule, a number or a 0-d tensor) to the transform behind the clipping."""
    name = OptimizerNames(args.optim)
    cls, groups, kwargs = optimizer_and_groups(args, model, total_steps=total_steps)
    if "weight_decay" in Options.of(args).given:
        warnings.warn(
            "optim_args: weight_decay has no effect, as in transformers: each group of parameters carries that of "
            f"TrainingArguments(weight_decay={args.weight_decay}). Set it there.",
            stacklevel=4,
        )
    if name in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        return partial(_adamw, args, decayed_names(model) if args.weight_decay else None)
    if name == OptimizerNames.SGD:
        own = {key: value for key, value in kwargs.items() if key not in ("lr", "weight_decay")}
        return partial(_sgd, args, decayed_names(model), own)
    return partial(_bridged, cls, groups, kwargs, args.learning_rate)


def _groups(args: TrainingArguments, model: nn.Module, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own: list[dict[str, Any]] | None = kwargs.pop("params", None)  # those of GaLore and APOLLO
    if own is None:
        groups = parameter_groups(args, model)
    else:
        groups = [{**group, "params": [trained[id(p)] for p in group["params"] if id(p) in trained]} for group in own]
    if kwargs.get("optim_bits") == 8:
        embeddings = {trained[id(m.weight)] for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in trained}
        groups = [part for group in groups for part in packages.split_unquantized(group, embeddings)]
    return groups


def _adamw(args: TrainingArguments, decayed: frozenset[str] | None, rate: Any) -> Transform:
    betas = {"b1": args.adam_beta1, "b2": args.adam_beta2, "eps": args.adam_epsilon}
    return tx.adamw(rate, **betas, weight_decay=args.weight_decay, mask=decayed)


def _sgd(args: TrainingArguments, decayed: frozenset[str], options: dict[str, Any], rate: Any) -> Transform:
    descent = tx.sgd(rate, **options)
    return tx.chain(tx.add_decayed_weights(args.weight_decay, mask=decayed), descent) if args.weight_decay else descent


def _bridged(cls: Any, groups: list[dict[str, Any]], kwargs: dict[str, Any], peak: float, rate: Any) -> Transform:
    """A torch optimizer whose groups all have the rate `peak`; the rate in use comes as a factor on it."""

    def factor(step: Any) -> Any:
        value = rate(step) if callable(rate) else float(rate)
        return value / peak if peak else 0.0

    return tx.from_torch(cls, groups=groups, schedule=factor, **kwargs)


def _adamw_torch(args: TrainingArguments, options: Options) -> tuple[Any, dict[str, Any]]:
    options.read()
    fused = {"fused": True} if args.optim == OptimizerNames.ADAMW_TORCH_FUSED else {}
    return torch.optim.AdamW, {**packages.adam(args), **fused}


def _sgd_torch(args: TrainingArguments, options: Options) -> tuple[Any, dict[str, Any]]:
    taken = options.read(momentum=float, dampening=float, weight_decay=float, nesterov=bool)
    return torch.optim.SGD, taken


def _adagrad(args: TrainingArguments, options: Options) -> tuple[Any, dict[str, Any]]:
    return torch.optim.Adagrad, options.read(lr_decay=float, weight_decay=float, eps=float)


def _rmsprop(args: TrainingArguments, options: Options) -> tuple[Any, dict[str, Any]]:
    return torch.optim.RMSprop, options.read(momentum=float, alpha=float, eps=float, weight_decay=float, centered=bool)


_LOW_RANK = frozenset(name for name in OptimizerNames if name.startswith(("galore", "apollo")))
_FUSED_BACKWARD = frozenset({OptimizerNames.LOMO, OptimizerNames.ADALOMO})
_MAKERS: dict[OptimizerNames, Callable[[TrainingArguments, Options], tuple[Any, dict[str, Any]]]] = {
    **dict.fromkeys(OptimizerNames, packages.bitsandbytes),
    OptimizerNames.ADAMW_TORCH: _adamw_torch,
    OptimizerNames.ADAMW_TORCH_FUSED: _adamw_torch,
    OptimizerNames.SGD: _sgd_torch,
    OptimizerNames.ADAGRAD: _adagrad,
    OptimizerNames.RMSPROP: _rmsprop,
    OptimizerNames.ADAFACTOR: packages.adafactor,
    OptimizerNames.ADAMW_TORCH_XLA: packages.torch_xla,
    OptimizerNames.ADAMW_TORCH_NPU_FUSED: packages.torch_npu,
    OptimizerNames.ADAMW_ANYPRECISION: packages.torchdistx,
    OptimizerNames.ADAMW_TORCH_4BIT: packages.torchao,
    OptimizerNames.ADAMW_TORCH_8BIT: packages.torchao,
    OptimizerNames.GROKADAMW: packages.grokadamw,
    OptimizerNames.STABLE_ADAMW: packages.stable_adamw,
    **dict.fromkeys(_FUSED_BACKWARD, packages.lomo),
    **dict.fromkeys([name for name in OptimizerNames if name.startswith("schedule_free")], packages.schedule_free),
    **dict.fromkeys([name for name in OptimizerNames if name.startswith("galore")], packages.galore),
    **dict.fromkeys([name for name in OptimizerNames if name.startswith("apollo")], packages.apollo),
}
