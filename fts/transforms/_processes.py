"""torch optimizers, written for one process, on tensors that are spread over several."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fts.dtensors import any_dtensor, is_dtensor, redistribute, reduce_partial, replicate_like
from fts.typing import Params


def over_processes(params: Params) -> AbstractContextManager[Any]:
    """In which an optimizer may step on parameters that are spread over processes."""
    return _OverProcesses() if any_dtensor(params.values()) else nullcontext()


class _OverProcesses(TorchFunctionMode):
    """Each operation finishes its sums over processes, and takes plain tensors as what every process has.

    Optimizers write norms and means in place, and keep factored moments as plain tensors: neither goes with DTensors by itself.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {} if kwargs is None else kwargs
        spread = next((value for value in (*args, *given.values()) if is_dtensor(value)), None)
        if spread is not None:
            args = [_joined(value, spread) for value in args]
            given = {key: _joined(value, spread) for key, value in given.items()}
            if args and is_dtensor(args[0]) and _writes(func):
                args = [_fitted(value, args[0]) for value in args]
                given = {key: _fitted(value, args[0]) for key, value in given.items()}
        result = func(*args, **given)
        return reduce_partial(result) if isinstance(result, Tensor) else result


def _writes(func: Any) -> bool:
    """Whether an operation writes its first argument, by torch's naming: `add_`, `__iadd__`."""
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _fitted(value: Any, target: Tensor) -> Any:
    """An argument in the layout of what is written; torch refuses to do it where there are more processes than rows."""
    return redistribute(value, target) if is_dtensor(value) and value.shape == target.shape else value


def _joined(value: Any, spread: Tensor) -> Any:
    """A plain tensor as a spread one that is whole on each process, in the same memory."""
    # single numbers go with any tensor
    plain = isinstance(value, Tensor) and value.ndim > 0 and not is_dtensor(value)
    return replicate_like(value, spread) if plain else value
