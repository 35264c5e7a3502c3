"""The torch optimizer classes that `optim` names, with their keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fts.errors import ArgumentError
from fts.trainer.arguments import OptimizerNames, TrainingArguments
from fts.trainer.optimization import third_party
from fts.trainer.optimization.parameter_groups import low_rank_groups, make_parameter_groups, with_parameters
from fts.trainer.optimization.third_party import OptimArgs


def optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
    """The torch optimizer that `optim` names and its options, as transformers' Trainer makes it.

    Args:
        args: `optim`, `optim_args`, `optim_target_modules`, `learning_rate`, `weight_decay` and those of Adam.
        model: is needed by GaLore and APOLLO, whose options have "params", and by LOMO, whose options have "model".

    Returns:
        A class and its keyword arguments. The `weight_decay` of parameter groups (`make_parameter_groups`) has precedence.

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
    cls, kwargs = _OPTIMIZERS[name](args, OptimArgs.of(args))
    if name in _LOW_RANK:
        if model is None:
            raise ArgumentError(f"optim='{name}' needs the model, whose linear layers it projects.")
        kwargs["params"] = with_parameters(low_rank_groups(args, model, kwargs.pop("target")), model)
    if name in _FUSED_BACKWARD:
        if model is None:
            raise ArgumentError(f"optim='{name}' needs the model, on which it puts its hooks.")
        kwargs["model"] = model
    return cls, {"lr": args.learning_rate, **kwargs}


def optimizer_and_groups(
    args: TrainingArguments, model: nn.Module, *, total_steps: int | None = None
) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """The torch optimizer class that `make_transform` and the proxy of it are made of, with its groups.

    Args:
        args: as for `optimizer_cls_and_kwargs`.
        model: its trained parameters, of which some decay.
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
    return third_party.with_plain_state(cls), _resolve_groups(args, model, kwargs), kwargs


def _resolve_groups(args: TrainingArguments, model: nn.Module, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own: list[dict[str, Any]] | None = kwargs.pop("params", None)  # those of GaLore and APOLLO
    if own is None:
        groups = make_parameter_groups(args, model)
    else:
        groups = [{**group, "params": [trained[id(p)] for p in group["params"] if id(p) in trained]} for group in own]
    if kwargs.get("optim_bits") == 8:
        embeddings = {trained[id(m.weight)] for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in trained}
        groups = [part for group in groups for part in third_party.split_unquantized(group, embeddings)]
    return groups


def _adamw_torch(args: TrainingArguments, options: OptimArgs) -> tuple[Any, dict[str, Any]]:
    options.parse()
    fused = {"fused": True} if args.optim == OptimizerNames.ADAMW_TORCH_FUSED else {}
    return torch.optim.AdamW, {**third_party.adam(args), **fused}


def _sgd_torch(args: TrainingArguments, options: OptimArgs) -> tuple[Any, dict[str, Any]]:
    taken = options.parse(momentum=float, dampening=float, weight_decay=float, nesterov=bool)
    return torch.optim.SGD, taken


def _adagrad(args: TrainingArguments, options: OptimArgs) -> tuple[Any, dict[str, Any]]:
    return torch.optim.Adagrad, options.parse(lr_decay=float, weight_decay=float, eps=float)


def _rmsprop(args: TrainingArguments, options: OptimArgs) -> tuple[Any, dict[str, Any]]:
    return torch.optim.RMSprop, options.parse(momentum=float, alpha=float, eps=float, weight_decay=float, centered=bool)


_LOW_RANK = frozenset(name for name in OptimizerNames if name.startswith(("galore", "apollo")))

_FUSED_BACKWARD = frozenset({OptimizerNames.LOMO, OptimizerNames.ADALOMO})

_OPTIMIZERS: dict[OptimizerNames, Callable[[TrainingArguments, OptimArgs], tuple[Any, dict[str, Any]]]] = {
    **dict.fromkeys(OptimizerNames, third_party.bitsandbytes),
    OptimizerNames.ADAMW_TORCH: _adamw_torch,
    OptimizerNames.ADAMW_TORCH_FUSED: _adamw_torch,
    OptimizerNames.SGD: _sgd_torch,
    OptimizerNames.ADAGRAD: _adagrad,
    OptimizerNames.RMSPROP: _rmsprop,
    OptimizerNames.ADAFACTOR: third_party.adafactor,
    OptimizerNames.ADAMW_TORCH_XLA: third_party.torch_xla,
    OptimizerNames.ADAMW_TORCH_NPU_FUSED: third_party.torch_npu,
    OptimizerNames.ADAMW_ANYPRECISION: third_party.torchdistx,
    OptimizerNames.ADAMW_TORCH_4BIT: third_party.torchao,
    OptimizerNames.ADAMW_TORCH_8BIT: third_party.torchao,
    OptimizerNames.GROKADAMW: third_party.grokadamw,
    OptimizerNames.STABLE_ADAMW: third_party.stable_adamw,
    **dict.fromkeys(_FUSED_BACKWARD, third_party.lomo),
    **dict.fromkeys([name for name in OptimizerNames if name.startswith("schedule_free")], third_party.schedule_free),
    **dict.fromkeys([name for name in OptimizerNames if name.startswith("galore")], third_party.galore),
    **dict.fromkeys([name for name in OptimizerNames if name.startswith("apollo")], third_party.apollo),
}
