"""Laws of structure: the types, shapes and dtypes of states, updates and infos, and that they do not change."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from fts.state import TrainState
from fts.testing.comparison import fail, law, named_tensors, require_equal, transform_summary
from fts.transforms import apply_updates
from fts.typing import OptState, Params, Transform


def state_is_tensors(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """A state is a tensor, or tuples, NamedTuples and dicts of tensors, without gradients.

    Args:
        transform: to check.
        params: the parameters.
        gradients: of successive updates.

    Raises:
        LawError: a state has other leaves.
    """
    with law("state_is_tensors", transform_summary(transform)):
        state = transform.init(params)
        _require_tensors("init(params)", state)
        for grads in gradients:
            _, state, _ = transform.update(grads, state, params)
            _require_tensors("state", state)


def structure_is_stable(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """Updates have the gradients' names, shapes and dtypes; the state and the info keep their structure, shapes and dtypes.

    Updates of parameters in 16 bits may be in float32: their sum is then rounded once.

    Args:
        transform: to check.
        params: the parameters.
        gradients: of successive updates.

    Raises:
        LawError: a structure, shape, dtype or device changed.
    """
    with law("structure_is_stable", transform_summary(transform)):
        state = transform.init(params)
        start = _specs("state", state)
        structure = optree.tree_structure(state)
        reported: dict[str, Any] | None = None
        for grads in gradients:
            updates, state, info = transform.update(grads, state, params)
            _require_same_specs("updates", _specs("updates", _narrowed(updates, grads)), _specs("updates", grads))
            if optree.tree_structure(state) != structure:
                fail(f"the state's structure became {optree.tree_structure(state)} from {structure}")
            _require_same_specs("state", _specs("state", state), start)
            specs = _specs("info", info)
            _require_same_specs("info", specs, specs if reported is None else reported)
            reported = specs


def info_is_flat(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """An info is a dictionary of 0-d tensors by name.

    Args:
        transform: to check.
        params: the parameters.
        gradients: of successive updates.

    Raises:
        LawError: an info is not.
    """
    with law("info_is_flat", transform_summary(transform)):
        state = transform.init(params)
        for grads in gradients:
            _, state, info = transform.update(grads, state, params)
            if not isinstance(info, dict):
                fail(f"info is a {type(info).__name__}, not a dictionary")
            for key, value in info.items():
                if not isinstance(key, str):
                    fail(f"info has the key {key!r}, which is not a string")
                if not isinstance(value, Tensor) or value.ndim != 0:
                    found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
                    fail(f"info[{key!r}] is {found}, not a 0-d tensor")


def state_round_trips(transform: Transform, params: Params, gradients: Sequence[Params]) -> None:
    """A state that is saved to safetensors and loaded is the same, bit for bit.

    Args:
        transform: to check.
        params: the parameters.
        gradients: of successive updates.

    Raises:
        LawError: the loaded state differs, or the state cannot be saved.
    """
    with law("state_round_trips", transform_summary(transform)):
        state = TrainState.create(params, transform, seed=3)
        for grads in gradients:
            updates, opt_state, _ = transform.update(grads, state.opt_state, state.params)
            state = state.replace(params=apply_updates(state.params, updates), opt_state=opt_state, step=state.step + 1)
        with tempfile.TemporaryDirectory() as directory:
            loaded = TrainState.load(state.save(directory), like=TrainState.create(params, transform))
        require_equal("loaded", loaded, state)
        if list(loaded.params) != list(state.params):
            fail(f"the loaded parameters are in the order {list(loaded.params)}, not {list(state.params)}")


def _narrowed(updates: Params, grads: Params) -> Params:
    """The updates; float32 ones of 16-bit gradients are cast to the dtype of these."""
    narrow = {name for name, grad in grads.items() if grad.dtype in (torch.bfloat16, torch.float16)}
    return {
        name: update.to(grads[name].dtype) if name in narrow and update.dtype == torch.float32 else update
        for name, update in updates.items()
    }


def _require_tensors(what: str, tree: OptState) -> None:
    if isinstance(tree, Tensor):
        if tree.requires_grad:
            fail(f"{what} requires a gradient; detach the tensors of a state")
        return
    if isinstance(tree, dict):
        children = [(f"{what}[{key!r}]", child) for key, child in tree.items()]
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        children = [(f"{what}.{key}", getattr(tree, key)) for key in tree._fields]
    elif isinstance(tree, (tuple, list)):
        children = [(f"{what}[{i}]", child) for i, child in enumerate(tree)]
    else:
        fail(f"{what} is {tree!r} ({type(tree).__name__}); a state consists of tensors: use a 0-d tensor for a number")
    for path, child in children:
        _require_tensors(path, child)


def _specs(what: str, tree: Any) -> dict[str, Any]:
    return {path: (tensor.dtype, list(tensor.shape), tensor.device) for path, tensor in named_tensors(what, tree).items()}


def _require_same_specs(what: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    if found.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        fail(f"{what}: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}")
    for path, form in found.items():
        if form != expected[path]:
            one, two = (f"{dtype}{shape} on {device}" for dtype, shape, device in (form, expected[path]))
            fail(f"{path} is {one}, expected {two}")
