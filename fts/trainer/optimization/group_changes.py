"""What callbacks wrote into the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fts.errors import ArgumentError


def parse_group_changes(changed: dict[int, dict[str, Any]], filled: Collection[int] = ()) -> tuple[dict[str, Any], float | None]:
    """What was written into the proxy's groups: arguments for the rest of the run, and the rate of the next update.

    Args:
        changed: by the group's index, the new values by name.
        filled: the groups that have parameters; a new rate must be that of all of them.

    Raises:
        ArgumentError: fts's own optimizer has no such setting for that group.

    >>> parse_group_changes({0: {"weight_decay": 0.1, "lr": 0.5}, 1: {"lr": 0.5}})
    ({'weight_decay': 0.1}, 0.5)
    """
    values: dict[str, Any] = {}
    rates = {group["lr"] for group in changed.values() if "lr" in group}
    for index, group in changed.items():
        for name, value in group.items():
            if name == "weight_decay" and index == 0:
                values["weight_decay"] = value
            elif name == "betas":
                values["adam_beta1"], values["adam_beta2"] = value
            elif name == "eps":
                values["adam_epsilon"] = value
            elif name != "lr":
                raise _unsupported_change(index, name, value)
    without_rate = [index for index in filled if "lr" not in changed.get(index, {})]
    if len(rates) > 1 or (rates and without_rate):
        raise _unsupported_change(0, "lr", sorted(rates))
    return values, next(iter(rates), None)


def _unsupported_change(index: int, name: str, value: Any) -> ArgumentError:
    return ArgumentError(
        f"optimizer.param_groups[{index}][{name!r}] = {value!r} cannot be set in fts's own optimizer during a run: it takes "
        "one lr for all groups, betas, eps, and the weight_decay of the first group. For anything else override "
        "create_optimizer, which makes a torch optimizer."
    )
