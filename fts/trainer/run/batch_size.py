"""Training with the largest batch that fits (`auto_find_batch_size`)."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fts.errors import ArgumentError
from fts.trainer.callbacks import export_callbacks, restore_callbacks
from fts.trainer.model import named_tensors

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CPU_MESSAGES = ("can't allocate memory", "DefaultCPUAllocator: not enough memory")
DEVICE_MESSAGES = ("out of memory", "CUDNN_STATUS_NOT_SUPPORTED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted, on an accelerator or on the CPU.

    >>> is_out_of_memory(torch.OutOfMemoryError("full")), is_out_of_memory(RuntimeError("shape"))
    (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(message in text for message in (*CPU_MESSAGES, *DEVICE_MESSAGES))


def find_executable_batch_size(run: Callable[[int], Result], size: int, restore: Callable[[], None]) -> Result:
    """Run with a batch size, and again with half of it while memory is exhausted.

    Args:
        run: is called with the batch size.
        size: the first one.
        restore: called before each further attempt; restores everything as it was before the first one.

    Returns:
        What `run` returned.

    Raises:
        ArgumentError: not even one example fits.

    >>> def run(size):
    ...     if size > 2:
    ...         raise torch.OutOfMemoryError
    ...     return size
    >>> find_executable_batch_size(run, 8, lambda: None)
    2
    """
    first = size
    while True:
        try:
            return run(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise ArgumentError(
                    f"auto_find_batch_size=True: not even a batch of one example fits into memory (the first attempt had "
                    f"{first}). Use a smaller model, shorter examples, or gradient_checkpointing=True."
                ) from error
        # outside the handler, whose traceback references the tensors that did not fit
        size //= 2
        gc.collect()
        empty_cache()
        logger.warning("A batch of %s examples does not fit into memory: trying again from the start with %s.", 2 * size, size)
        restore()


def make_restore(model: nn.Module, callbacks: list[Any], optimizers: Sequence[Any] = ()) -> Callable[[], None]:
    """A function that restores a model's weights and the states of callbacks and optimizers as they are now.

    Args:
        model: a copy of its tensors is kept on the CPU.
        callbacks: those that have a state.
        optimizers: the user's torch optimizer and schedule, or None in their places.
    """
    torch_states = [None if part is None else copy.deepcopy(part.state_dict()) for part in optimizers]
    kept = {name: tensor.detach().cpu().clone() for name, tensor in named_tensors(model).items()}
    states = copy.deepcopy(export_callbacks(callbacks))

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in named_tensors(model).items():
                tensor.copy_(kept[name])
        restore_callbacks(callbacks, states)
        for part, state in zip(optimizers, torch_states, strict=True):
            if part is not None:
                part.load_state_dict(copy.deepcopy(state))

    return restore


def empty_cache(device: Any = None) -> None:
    """Release the memory that torch caches on the accelerator; nothing happens on the CPU."""
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()
