"""The state of a torch scheduler and the changed settings of a torch optimizer's groups, as JSON and back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fts.errors import CheckpointError

logger = logging.getLogger(__name__)

JSON_TYPES = (type(None), bool, int, float, str)


def group_settings(optimizer: Any) -> list[dict[str, Any]]:
    """A copy of the settings of an optimizer's groups, without their parameters.

    >>> groups = group_settings(torch.optim.SGD([torch.zeros(1)], lr=0.5))
    >>> groups[0]["lr"]
    0.5
    """
    return [{name: copy.deepcopy(value) for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def torch_state_dict(optimizer: Any, scheduler: Any, initial_settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of a torch scheduler, and the group settings that the run has changed, as far as JSON can represent them.

    Args:
        optimizer: a torch optimizer.
        scheduler: its scheduler, or None.
        initial_settings: `group_settings` when the run began; a run that resumes sets unchanged ones itself.
    """
    now = group_settings(optimizer)
    changed = [
        {name: value for name, value in group.items() if name not in old or not _equal(value, old[name])}
        for group, old in zip(now, initial_settings, strict=True)
    ]
    state = {} if scheduler is None else scheduler.state_dict()
    return {"scheduler": _to_json(state, scheduler), "groups": [_to_json(group, optimizer) for group in changed]}


def load_torch_state_dict(optimizer: Any, scheduler: Any, state: dict[str, Any]) -> None:
    """Restore what `torch_state_dict` returned.

    Raises:
        CheckpointError: the optimizer has other groups, or the scheduler another state.
    """
    groups = state.get("groups", [])
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"The checkpoint is of an optimizer with {len(groups)} groups of parameters, this one has "
            f"{len(optimizer.param_groups)}. Make the optimizer as it was."
        )
    try:
        if scheduler is not None and state.get("scheduler"):
            own = scheduler.state_dict()
            scheduler.load_state_dict({name: _decode(value, own.get(name)) for name, value in state["scheduler"].items()})
        for group, changed in zip(optimizer.param_groups, groups, strict=True):
            for name, value in changed.items():
                _set_value(group, name, _decode(value, group.get(name)))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"The checkpoint's learning rate schedule does not fit {type(scheduler).__name__}: {error!r}. Make it as it was."
        ) from error


def _set_value(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group.get(name), Tensor):
        group[name].copy_(torch.as_tensor(value))
    else:
        group[name] = value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _to_json(values: dict[str, Any], owner: Any) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        try:
            kept[name] = _encode(value)
        except TypeError:
            logger.warning("%s keeps %r, which a checkpoint cannot store.", type(owner).__name__, name)
    return kept


def _encode(value: Any) -> Any:
    if isinstance(value, JSON_TYPES):
        return value
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"pairs": [[_encode(key), _encode(part)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "list": [_encode(part) for part in value]}
    raise TypeError(type(value).__name__)


def _decode(value: Any, like: Any = None) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, parts), *rest) = value.items()
    if kind == "tensor":
        return torch.tensor(parts, dtype=getattr(torch, rest[0][1]))
    if kind == "pairs":
        pairs = {_decode(key): _decode(part) for key, part in parts}
        make: Callable[[Any], Any] = type(like) if isinstance(like, dict) else dict  # MultiStepLR keeps a Counter
        return make(pairs)
    return (tuple if kind == "tuple" else list)(map(_decode, parts))
