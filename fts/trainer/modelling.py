"""What the arguments do to the model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fts.errors import ArgumentError
from fts.steps.losses import base_model

BARE = "You should choose a model with a head"


def checkpoint_activations(model: nn.Module, options: dict[str, Any] | None = None) -> None:
    """Let a model recompute its activations in the backward pass, to save memory (`gradient_checkpointing`).

    Args:
        model: a transformers model, or any with `gradient_checkpointing_enable`.
        options: `gradient_checkpointing_kwargs`, such as `{"use_reentrant": False}`.

    Raises:
        ArgumentError: the model has no such method, or does not support it.
    """
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    if not callable(enable):
        raise ArgumentError(
            f"gradient_checkpointing=True, but {type(model).__name__} has no gradient_checkpointing_enable. Define it, or use "
            "torch.utils.checkpoint in its forward and leave the argument out."
        )
    try:
        enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise ArgumentError(f"gradient_checkpointing=True cannot be used with {type(model).__name__}: {error}") from error


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Add uniform noise to a model's input embeddings in train mode, until the block ends (NEFTune, Jain et al. 2023).

    Args:
        model: has `get_input_embeddings`.
        alpha: the noise lies between plus and minus `alpha / sqrt(tokens * width)`; None adds none.

    Raises:
        ArgumentError: the model does not tell its input embeddings.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.words = nn.Embedding(4, 2)
    ...     def get_input_embeddings(self):
    ...         return self.words
    >>> net = Net()
    >>> with noisy_embeddings(net, 5.0):
    ...     noisy = net.words(torch.tensor([[1]]))
    >>> bool((noisy != net.words(torch.tensor([[1]]))).all())
    True
    """
    if alpha is None:
        yield
        return
    find: Any = getattr(base_model(model), "get_input_embeddings", None)
    if not callable(find):
        raise ArgumentError(
            f"neftune_noise_alpha={alpha} adds noise to input embeddings, but {type(model).__name__} has no get_input_embeddings."
        )

    def add_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        limit = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.empty_like(output).uniform_(-limit, limit)

    handle = find().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def check_has_head(model: nn.Module) -> None:
    """Raise ArgumentError for a transformers model that computes hidden states only, which nothing can be trained on.

    >>> check_has_head(nn.Linear(1, 1))
    """
    kind = type(model).__name__
    bare = type(model).__module__.startswith("transformers.models.") and kind.endswith("Model") and hasattr(model, "config")
    if bare and "Head" not in kind and not _takes_labels(model):
        raise ArgumentError(
            f"{kind} computes hidden states only and takes no labels. {BARE}, such as AutoModelForSequenceClassification, or "
            "pass compute_loss_func=."
        )


def _takes_labels(model: nn.Module) -> bool:
    return "labels" in getattr(model.forward, "__code__", None).co_varnames  # type: ignore[union-attr]


def made_by(model_init: Callable[..., nn.Module] | None, trial: Any = None) -> nn.Module:
    """Call `model_init`, with the trial of a search if it takes an argument.

    Raises:
        ArgumentError: it takes more than one argument, or made no module.
    """
    if model_init is None:
        raise ArgumentError("There is no model_init to make a model: Trainer(model_init=...).")
    parameters = [p for p in inspect.signature(model_init).parameters.values() if p.kind not in _REST]
    required = [p for p in parameters if p.default is p.empty]
    if len(required) > 1:
        raise ArgumentError(f"model_init must take no argument, or the trial of a search; it takes {len(required)}.")
    model = model_init(trial) if len(parameters) == 1 or required else model_init()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model_init must return a torch.nn.Module, not {type(model).__name__}.")
    return model


_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
