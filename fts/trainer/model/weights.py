"""The weights of the model: those that are trained, those that are evaluated, those that a file has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fts import steps, transforms as tx
from fts.errors import ArgumentError
from fts.state import WEIGHTS_NAME, TrainState
from fts.storage import has_tensors, read_into, read_tensor_specs, read_tensors
from fts.typing import Transform

ADAPTER_SAFE_WEIGHTS_NAME = "adapter_model.safetensors"
"""The file in which peft saves adapters alone."""


@contextmanager
def swap_eval_params(model: nn.Module, state: TrainState, transform: Transform) -> Iterator[None]:
    """Swap in the weights that the optimizer evaluates with, where these are not those it trains, until the block ends."""
    params = tx.eval_params(transform, state.opt_state, state.params)
    if params is state.params:
        yield
        return
    with steps.eval_module(model, state.replace(params=params)):
        yield


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Read a checkpoint's weights and buffers, or its adapters where it has these alone, into a model, in place.

    Raises:
        ArgumentError: names or shapes are not those of the model.
        CheckpointError: there are none, or a file is corrupt.
    """
    directory = Path(directory)
    if has_only_adapters(directory):
        from peft import set_peft_model_state_dict  # it knows the names

        set_peft_model_state_dict(model, read_tensors(directory, ADAPTER_SAFE_WEIGHTS_NAME))
        return
    found, targets = read_tensor_specs(directory, WEIGHTS_NAME), named_tensors(model)
    missing = [name for name, _ in model.named_parameters() if name not in found]
    unknown = [name for name in found if name not in targets or targets[name].shape != found[name].shape]
    if missing or unknown:
        raise ArgumentError(
            f"{directory} does not fit the model {type(model).__name__}: missing {missing[:3]}, unexpected {unknown[:3]}."
        )
    with torch.no_grad():
        read_into(directory, WEIGHTS_NAME, {name: targets[name].detach() for name in found})


def has_only_adapters(directory: Path) -> bool:
    """Whether a checkpoint has the adapters of a model, and not the weights below them."""
    return has_tensors(directory, ADAPTER_SAFE_WEIGHTS_NAME) and not has_tensors(directory, WEIGHTS_NAME)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def apply_eval_params(model: nn.Module, state: TrainState, transform: Transform, *, always: bool = False) -> None:
    """Write the weights that the optimizer evaluates with into the model: where these are not those it trains, or always."""
    params = tx.eval_params(transform, state.opt_state, state.params)
    if always or params is not state.params:
        state.replace(params=params).apply_to(model)


def shares_storage(state: TrainState, model: nn.Module) -> bool:
    """Whether a state's tensors are those of the model, so that writing one writes the other."""
    own = named_tensors(model)
    return all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in (state.params | state.buffers).items())
