"""Losses, and their return values in one form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fts.errors import ArgumentError, BatchError, LossError
from fts.typing import Batch, LossFn, LossOutput


@attrs.frozen(eq=False)
class ModuleLoss:
    """A loss that runs a module with a state's tensors; made by `module_loss`."""

    module: nn.Module
    fn: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        fn = "" if self.fn is None else f", {function_name(self.fn)}"
        return f"module_loss({type(self.module).__name__}{fn})"


def module_loss(module: nn.Module, fn: Callable[..., Any] | None = None) -> ModuleLoss:
    """Make a loss of a module, for `train_step`, `eval_step` and `value_and_grad`.

    Args:
        module: runs with the state's tensors during a step, and has its own again afterwards.
        fn: `fn(model, batch)` returns a loss (see `fts.typing.LossFn`); `model` is the module with the state's tensors.
            Without it the module is called as Hugging Face's models are, `module(**batch)`, and must return its loss:
            an object with `.loss`, a dictionary with "loss", or a tuple whose first element it is. Its weight is then the
            number of label tokens, if `labels` are tokens (see `num_label_tokens`).

    Returns:
        The loss.

    Raises:
        ArgumentError: `module` is not a module, or `fn` does not take two arguments.

    >>> import torch
    >>> net = torch.nn.Linear(2, 1)
    >>> module_loss(net, lambda model, batch: model(batch["x"]).square().mean()).label
    'module_loss(Linear, <lambda>)'
    """
    if not isinstance(module, nn.Module):
        raise ArgumentError(
            f"module_loss needs a torch.nn.Module, not {type(module).__name__}; a plain function is a loss already."
        )
    if fn is not None:
        check_callable(fn, "module_loss", "fn(model, batch)")
    return ModuleLoss(module, fn)


def check_callable(fn: Any, caller: str, signature: str) -> None:
    """Raise ArgumentError unless `fn` is a function of at least two positional arguments."""
    if not callable(fn):
        raise ArgumentError(f"{caller} needs a function {signature}, not {type(fn).__name__}.")
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some built-in callables have no signature
        return
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ArgumentError(
            f"{caller} needs a function {signature}; {function_name(fn)}{inspect.signature(fn)} does not take two arguments."
        )


def function_name(fn: Any) -> str:
    """The name of a function, for messages."""
    return str(getattr(fn, "__name__", None) or type(fn).__name__)


def call_loss(loss: LossFn | ModuleLoss, params: Any, batch: Batch, *args: Any) -> LossOutput:
    """Run a loss, and convert its result to a checked `LossOutput`.

    Args:
        loss: a plain function of `(params, batch)`, or a module loss whose module has the state's tensors already.
        params: for a plain function; a module loss ignores it.
        batch: for the loss.
        args: further arguments of the loss.

    Raises:
        BatchError: the loss read a key that the batch does not have.
        LossError: it returned something that is not a scalar loss.
    """
    try:
        if not isinstance(loss, ModuleLoss):
            result = loss(params, batch, *args)
        elif loss.fn is not None:
            result = loss.fn(loss.module, batch, *args)
        elif isinstance(batch, Mapping):
            result = _module_output(loss.module, loss.module(**batch), batch)
        else:
            raise BatchError(
                f"A module loss without a function calls module(**batch), so the batch must be a dictionary, not "
                f"{type(batch).__name__}. Pass a function that uses the batch: steps.module_loss(module, fn)."
            )
    except KeyError as error:
        key = error.args[0] if error.args else None
        if isinstance(batch, Mapping) and isinstance(key, str) and key not in batch:
            raise BatchError(
                f"The loss read batch[{key!r}], which the batch does not have. Its keys are {sorted(map(str, batch))}."
            ) from error
        raise
    return as_loss_output(result)


def as_loss_output(result: Any) -> LossOutput:
    """Convert any result that a loss function may return to a checked `LossOutput`.

    >>> import torch
    >>> as_loss_output((torch.tensor(2.0), 3)).weight
    3
    """
    output = _to_loss_output(result)
    loss, weight, metrics = output
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__} ({loss!r:.80})"
        raise LossError(f"A loss must be a 0-d tensor, but the loss function returned {found}. Reduce it, as with .mean().")
    if not loss.is_floating_point():
        raise LossError(f"A loss must be a floating-point tensor, but the loss function returned {loss.dtype}.")
    if isinstance(weight, Tensor) and weight.ndim != 0:
        raise LossError(f"A loss's weight must be a number or a 0-d tensor, not a tensor of shape {list(weight.shape)}.")
    if metrics:
        for name, value in metrics.items():
            mean = value[0] if isinstance(value, tuple) else value
            if name == "loss" or not isinstance(name, str):
                raise LossError(f"A metric cannot be named {name!r}; the loss itself is logged as 'loss'.")
            if not isinstance(mean, (Tensor, int, float)) or (isinstance(mean, Tensor) and mean.ndim != 0):
                found = f"shape {list(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
                raise LossError(f"The metric {name!r} must be a 0-d tensor, a number, or (mean, weight), not {found}.")
    return output


def _to_loss_output(result: Any) -> LossOutput:
    if isinstance(result, (Tensor, LossOutput)):
        return result if isinstance(result, LossOutput) else LossOutput(result)
    if isinstance(result, tuple) and len(result) == 3:
        return LossOutput(*result)
    if isinstance(result, tuple) and len(result) == 2:
        loss, second = result
        return LossOutput(loss, None, second) if isinstance(second, Mapping) else LossOutput(loss, second)
    loss = getattr(result, "loss", None)
    if loss is None:
        raise LossError(
            f"The loss function returned {type(result).__name__}. Return a 0-d tensor, (loss, weight), (loss, metrics), "
            "(loss, weight, metrics), or an output with .loss."
        )
    return LossOutput(loss)


def _module_output(module: nn.Module, output: Any, batch: Mapping[str, Any]) -> LossOutput:
    return LossOutput(_required_loss(output, batch), num_label_tokens(module, batch.get("labels")))


def num_label_tokens(module: nn.Module, labels: Any) -> Tensor | None:
    """The number of label tokens that a model's mean loss is over.

    Args:
        module: if it shifts labels (see `shifts_labels`), the first token of each sequence does not count.
        labels: integers, of which -100 is ignored; of shape [batch size, tokens, ...] if they are tokens.

    Returns:
        A 0-d int64 tensor, or None if the labels are not tokens.

    >>> import torch
    >>> num_label_tokens(nn.Linear(1, 1), torch.tensor([[1, 2, -100], [3, -100, -100]]))
    tensor(3)
    """
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return None
    counted = labels[..., 1:] if shifts_labels(module) else labels
    count: Tensor = torch.ne(counted, -100).sum()
    return count


def base_model(module: nn.Module) -> nn.Module:
    """The model inside peft's wrapper, or the module itself."""
    base: Any = getattr(module, "get_base_model", None)
    inner: nn.Module = base() if callable(base) else module
    return inner


def shifts_labels(module: nn.Module) -> bool:
    """Whether a model's loss compares position t with label t + 1, as Hugging Face's causal language models do.

    >>> shifts_labels(nn.Linear(1, 1))
    False
    """
    module = base_model(module)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return False
    kind = getattr(module, "loss_type", None)
    return kind == "ForCausalLM" or (kind is None and type(module).__name__.endswith("LMHeadModel"))


def extract_loss(output: Any) -> Any:
    """The loss in a model's output: the output itself, `.loss`, "loss", or the first of a tuple; None if there is none.

    >>> extract_loss({"loss": 1.0, "logits": 2.0}), extract_loss((1.0, 2.0))
    (1.0, 1.0)
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, (tuple, list)):
        return getattr(output, "loss", output[0] if output else None)
    return getattr(output, "loss", None)


def _required_loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    loss = extract_loss(output)
    if loss is None:
        raise LossError(
            f"The model returned {type(output).__name__} without a loss for a batch with the keys {sorted(map(str, batch))}. "
            "Models compute one when the batch has labels; otherwise pass steps.module_loss(module, fn) with fn(model, batch)."
        )
    return loss  # type: ignore[no-any-return]
