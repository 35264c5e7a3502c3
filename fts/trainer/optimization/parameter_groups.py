"""The parameter groups of an optimizer: with and without weight decay, and those that a low-rank optimizer projects."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments

logger = logging.getLogger(__name__)

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm(\.|$)|_norm(\.|$)")


def decay_parameter_names(model: nn.Module) -> frozenset[str]:
    """The trained parameters that weight decay applies to: all but biases and the weights of normalisation layers.

    Args:
        model: layers that are an `nn.LayerNorm`, or whose path says that they are a norm, count as normalisation.

    Returns:
        Names of parameters.

    >>> sorted(decay_parameter_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
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
        if parameter.requires_grad and name not in norms and not _NO_DECAY.search(name.lower())
    )


def make_parameter_groups(
    args: TrainingArguments, model: nn.Module, decayed: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """The trained parameters in two groups: those that decay, then the others.

    Args:
        args: `weight_decay`.
        model: its parameters with `requires_grad`.
        decayed: the names of those that decay; None: `decay_parameter_names`.

    Returns:
        `[{"params": names, "weight_decay": number}, ...]`, with the names in the model's order.

    >>> make_parameter_groups(TrainingArguments(weight_decay=0.1), nn.Linear(2, 2))
    [{'params': ['weight'], 'weight_decay': 0.1}, {'params': ['bias'], 'weight_decay': 0.0}]
    """
    decayed = decay_parameter_names(model) if decayed is None else decayed
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [name for name in trained if name in decayed], "weight_decay": args.weight_decay},
        {"params": [name for name in trained if name not in decayed], "weight_decay": 0.0},
    ]


def with_parameters(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """The same groups, with a model's Parameters in the place of their names, as torch's optimizers take them."""
    named = dict(model.named_parameters())
    return [{**group, "params": [named[name] for name in group["params"]]} for group in groups]


def low_rank_groups(args: TrainingArguments, model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters in two groups: the rest, then the weights of the linear layers that `optim_target_modules` names.

    Args:
        args: `optim_target_modules`: "all-linear", a regular expression for full module names, or a list of names, parts of
            names and regular expressions.
        model: its modules are searched.
        options: of the second group.

    Returns:
        `[{"params": names}, {"params": names, **options}]`.

    Raises:
        ArgumentError: `optim_target_modules` is missing or of another kind, or no linear layer has such a name.

    >>> args = TrainingArguments(optim="galore_adamw", optim_target_modules=["0"])
    >>> low_rank_groups(args, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"rank": 4})
    [{'params': ['0.bias', '1.weight', '1.bias']}, {'params': ['0.weight'], 'rank': 4}]
    """
    wanted = args.optim_target_modules
    if not isinstance(wanted, (str, list, tuple)) or not wanted:
        raise ArgumentError(
            f"optim='{args.optim}' needs optim_target_modules, not {wanted!r}: 'all-linear', a regular expression, or a list of "
            "module names such as ['attn', 'mlp']."
        )
    targets = {f"{name}.weight" for name, module in model.named_modules() if _is_target(wanted, name, module)}
    names = [name for name, _ in model.named_parameters()]
    if not targets & set(names):
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise ArgumentError(
            f"optim_target_modules={wanted!r} names no linear layer of {type(model).__name__}, as optim='{args.optim}' needs. "
            f"It has {', '.join(linear[:5])}{' ...' if len(linear) > 5 else ''}."
        )
    return [
        {"params": [name for name in names if name not in targets]},
        {"params": [name for name in names if name in targets], **options},
    ]


def _is_target(wanted: Any, name: str, module: nn.Module) -> bool:
    if isinstance(wanted, str):
        everything = wanted.replace("_", "-") == "all-linear"
        return isinstance(module, nn.Linear) and (everything or re.fullmatch(wanted, name) is not None)
    named = any(part in name for part in wanted)
    if named and not isinstance(module, nn.Linear):
        logger.warning("optim_target_modules: %s is left out, because it is no linear layer.", name)
        return False
    return isinstance(module, nn.Linear) and (named or any(re.fullmatch(part, name) for part in wanted))
