"""Preparation of the model by the arguments: device, kernels, gradient checkpointing, NEFTune, overflow detection."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fts.errors import ArgumentError, MissingDependencyError
from fts.steps.losses import base_model
from fts.trainer.arguments import TrainingArguments
from fts.trainer.data import forward_arguments
from fts.trainer.model.float8 import convert_to_float8

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def prepare_model(model: nn.Module, args: TrainingArguments) -> nn.Module:
    """Prepare a model as the arguments say: check its head, choose caches and kernels, move it to the device.

    Raises:
        ArgumentError: it computes hidden states only.
        MissingDependencyError: a package is missing.
    """
    check_has_head(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = args.use_cache
    if args.use_liger_kernel:
        apply_liger_kernel(model, args.liger_kernel_config)
    if args.mixed_precision == "fp8":
        convert_to_float8(model)
    return model if args.place_model_on_device is False else model.to(args.device)


def apply_liger_kernel(model: nn.Module, options: dict[str, Any] | None = None) -> None:
    """Replace a transformers model's layers by Liger's fused kernels (`use_liger_kernel`).

    Args:
        model: a transformers model, perhaps inside peft's.
        options: `liger_kernel_config`: which kernels, such as `{"rope": True}`.

    Raises:
        MissingDependencyError: the package is missing.
        ArgumentError: the model is not one of transformers'.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply
    except ImportError as error:
        raise MissingDependencyError(
            "use_liger_kernel=True needs the package liger-kernel: pip install liger-kernel -c constraints.txt."
        ) from error
    inner = base_model(model)
    if not hasattr(inner, "config"):
        raise ArgumentError(f"use_liger_kernel=True is for transformers models; {type(inner).__name__} is none.")
    apply(model=inner, **(options or {}))


@contextmanager
def debug_overflow(model: nn.Module, debug: Collection[str]) -> Iterator[None]:
    """Detect overflow in each layer's output until the block ends, where `debug` says so.

    Args:
        model: any module.
        debug: `DebugOption` values; with "underflow_overflow" transformers' own tool reports and raises at the first one.
    """
    if "underflow_overflow" not in debug:
        yield
        return
    from transformers.debug_utils import DebugUnderflowOverflow

    before = {child: set(child._forward_hooks) for child in model.modules()}
    DebugUnderflowOverflow(model)
    try:
        yield
    finally:
        for child, hooks in before.items():
            for key in set(child._forward_hooks) - hooks:
                del child._forward_hooks[key]


def enable_gradient_checkpointing(model: nn.Module, options: dict[str, Any] | None = None) -> None:
    """Let a model recompute its activations in the backward pass to save memory (`gradient_checkpointing`).

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
def neftune_noise(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Add uniform noise to a model's input embeddings in train mode, until the block ends (NEFTune, Jain et al. 2023).

    Args:
        model: has `get_input_embeddings`.
        alpha: the noise is between plus and minus `alpha / sqrt(tokens * width)`; None adds none.

    Raises:
        ArgumentError: the model has no `get_input_embeddings`.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.words = nn.Embedding(4, 2)
    ...     def get_input_embeddings(self):
    ...         return self.words
    >>> net = Net()
    >>> with neftune_noise(net, 5.0):
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
    """Raise ArgumentError for a transformers model that computes hidden states only, and so no loss.

    >>> check_has_head(nn.Linear(1, 1))
    """
    kind = type(model).__name__
    bare = type(model).__module__.startswith("transformers.models.") and kind.endswith("Model") and hasattr(model, "config")
    if bare and "Head" not in kind and "labels" not in forward_arguments(model):
        raise ArgumentError(
            f"{kind} computes hidden states only and takes no labels. You should choose a model with a head, such as "
            "AutoModelForSequenceClassification, or pass compute_loss_func=."
        )


def call_model_init(model_init: Callable[..., nn.Module] | None, trial: Any = None) -> nn.Module:
    """Call `model_init`, with the trial of a search if it takes an argument.

    Raises:
        ArgumentError: it takes more than one argument, or made no module.
    """
    if model_init is None:
        raise ArgumentError("There is no model_init to make a model: Trainer(model_init=...).")
    model = model_init(trial) if accepts_trial(model_init) else model_init()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model_init must return a torch.nn.Module, not {type(model).__name__}.")
    return model


def accepts_trial(model_init: Callable[..., nn.Module]) -> bool:
    """Whether `model_init` takes the trial of a search.

    Raises:
        ArgumentError: it takes more than one argument.

    >>> accepts_trial(lambda trial: nn.Linear(1, 1)), accepts_trial(lambda: nn.Linear(1, 1))
    (True, False)
    """
    parameters = [p for p in inspect.signature(model_init).parameters.values() if p.kind not in _VARIADIC]
    required = [p for p in parameters if p.default is p.empty]
    if len(required) > 1:
        raise ArgumentError(f"model_init must take no argument, or the trial of a search; it takes {len(required)}.")
    return len(parameters) == 1 or bool(required)
