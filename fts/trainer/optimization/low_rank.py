"""Which layers the low-rank optimizers (GaLore, APOLLO) project."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from fts.errors import ArgumentError
from fts.trainer.arguments import TrainingArguments

logger = logging.getLogger(__name__)


def target_groups(args: TrainingArguments, model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters in two groups: the rest, then the weights of the linear layers that `optim_target_modules` names.

    Args:
        args: `optim_target_modules`: "all-linear", a regular expression for whole module names, or a list of names, parts of
            names and regular expressions.
        model: its modules are searched.
        options: of the second group.

    Returns:
        `[{"params": names}, {"params": names, **options}]`.

    Raises:
        ArgumentError: `optim_target_modules` is missing or of another kind, or no linear layer has such a name.

    >>> args = TrainingArguments(optim="galore_adamw", optim_target_modules=["0"])
    >>> target_groups(args, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"rank": 4})
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
