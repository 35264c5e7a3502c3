"""The state of a transform in the words of torch's optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fts.transforms._states import states_in
from fts.transforms._tensor_trees import decode
from fts.transforms._torch_transform import TorchState
from fts.transforms.adam import AdamState
from fts.transforms.momentum import SgdState
from fts.typing import OptState


def torch_moments(opt_state: OptState) -> dict[str, dict[str, Any]]:
    """What torch's optimizers would keep for each parameter.

    Args:
        opt_state: the state of a transform with `adam`, `adamw`, `sgd` or `from_torch` anywhere in it.

    Returns:
        By name of a parameter, the entries of `torch.optim.Optimizer.state`: `step`, `exp_avg` and `exp_avg_sq`;
        `momentum_buffer`; or those of the optimizer in `from_torch`. A parameter has none before its first update. The
        tensors are the state's own, not copies; they are consumed with the state when it is donated.

    >>> from fts import transforms as tx
    >>> descent, params = tx.adamw(0.1), {"w": torch.tensor([1.0])}
    >>> _, state, _ = descent.update({"w": torch.tensor([2.0])}, descent.init(params), params)
    >>> tx.torch_moments(state)
    {'w': {'step': tensor(1.), 'exp_avg': tensor([0.2000]), 'exp_avg_sq': tensor([0.0040])}}
    """
    found: dict[str, dict[str, Any]] = {}
    for state in states_in(opt_state, AdamState, SgdState, TorchState):
        for name, entry in _entries(state).items():
            found[name] = {**found.get(name, {}), **entry}
    return found


def _entries(state: Any) -> dict[str, dict[str, Any]]:
    if not int(state.step):
        return {}
    if isinstance(state, AdamState):
        count = torch.tensor(float(state.step))
        return {name: {"step": count, "exp_avg": mu, "exp_avg_sq": state.nu[name]} for name, mu in state.mu.items()}
    if isinstance(state, SgdState):
        return {name: {"momentum_buffer": buffer} for name, buffer in state.trace.items()}
    return {name: _plain(decode(entry)) for name, entry in state.params.items() if entry}


def _plain(entry: Any) -> dict[str, Any]:
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in entry.items()}
