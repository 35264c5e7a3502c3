"""torch optimizers, written for one process, on DTensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fts.dtensors import any_dtensor, is_dtensor, redistribute, reduce_partial, replicate_like
from fts.typing import Params


def dtensor_mode(params: Params) -> AbstractContextManager[Any]:
    """A context in which an optimizer can step on sharded parameters."""
    return _DTensorMode() if any_dtensor(params.values()) else nullcontext()


class _DTensorMode(TorchFunctionMode):
    """Each operation reduces partial placements, and takes plain tensors as replicated ones.

    Optimizers write norms and means in place, and keep factored moments as plain tensors: neither works with DTensors by itself.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {} if kwargs is None else kwargs
        dtensor = next((value for value in (*args, *given.values()) if is_dtensor(value)), None)
        if dtensor is not None:
            args = [_replicated(value, dtensor) for value in args]
            given = {key: _replicated(value, dtensor) for key, value in given.items()}
            if args and is_dtensor(args[0]) and _writes(func):
                args = [_redistributed(value, args[0]) for value in args]
                given = {key: _redistributed(value, args[0]) for key, value in given.items()}
        result = func(*args, **given)
        return reduce_partial(result) if isinstance(result, Tensor) else result


def _writes(func: Any) -> bool:
    """Whether an operation writes its first argument, by torch's naming: `add_`, `__iadd__`."""
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _redistributed(value: Any, target: Tensor) -> Any:
    """An argument with the placements of what is written; torch refuses to do it where there are more ranks than rows."""
    return redistribute(value, target) if is_dtensor(value) and value.shape == target.shape else value


def _replicated(value: Any, dtensor: Tensor) -> Any:
    """A plain tensor as a replicated DTensor, in the same memory."""
    # single numbers go with any tensor
    plain = isinstance(value, Tensor) and value.ndim > 0 and not is_dtensor(value)
    return replicate_like(value, dtensor) if plain else value
