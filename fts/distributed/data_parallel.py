"""Several GPUs in one process: each computes the loss of a part of the batch (torch's DataParallel)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fts.randomness import fold
from fts.steps.losses import as_loss_output
from fts.typing import LossOutput, Number


class _Part(nn.Module):
    """The loss of a part of the batch, as a module that DataParallel copies to each device."""

    def __init__(self, module: nn.Module, loss: Callable[..., Any], weigh: Callable[[Any], Number]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss
        self.weigh = weigh

    def forward(self, batch: Any, count: Tensor | None, kind: str, dtype: torch.dtype, autocasts: bool) -> Any:
        with torch.autocast(kind, dtype, enabled=autocasts):  # each device has a thread, which knows of no dtype
            output = as_loss_output(self.loss(self.module, batch, None if count is None else count[0]))
        weight = _number(self.weigh(batch), output.loss)
        # a mean over no items is NaN, also backwards
        value = output.loss if weight else torch.zeros_like(output.loss)
        metrics = {
            name: tuple(_number(part, weight)[None] for part in (given if isinstance(given, tuple) else (given, weight)))
            for name, given in output.metrics.items()
        }
        return value[None], weight[None], metrics


def _number(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).detach()


def combined(
    losses: Tensor, weights: Tensor, metrics: Mapping[str, tuple[Tensor, Tensor]], *, adds_up: bool
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss and the metrics of a batch, of those of its parts.

    Args:
        losses: of the parts, [parts].
        weights: over how many items these are means, [parts].
        metrics: by name the means of the parts and their weights, each [parts].
        adds_up: whether the losses are parts of a sum rather than means.

    Returns:
        The loss, `sum(w l) / sum(w)` or the plain sum, and by name the mean of a metric and its weight.

    >>> combined(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]), {}, adds_up=False)
    (tensor(2.), {})
    """
    means = {}
    for name, (values, items) in metrics.items():
        means[name] = (torch.where(items == 0, 0, values * items).sum() / items.sum(), items.sum())
    total = losses.sum() if adds_up else ((losses * weights).sum() / weights.sum()).to(losses.dtype)
    return total, means


def data_parallel_loss(
    module: nn.Module,
    loss: Callable[[nn.Module, Any, Tensor | None], Any],
    weigh: Callable[[Any], Number],
    adds_up: Callable[[Tensor | None], bool],
    devices: Sequence[int],
) -> Callable[[nn.Module, Any, Tensor | None], LossOutput]:
    """The same loss of a module, each part of whose batch is computed on a GPU of its own.

    Args:
        module: lies on the first device; the others get a copy for each pass.
        loss: `(model, batch, count)` -> a loss in any of the forms of `fts.typing.LossFn`; batches are dictionaries.
        weigh: from a part of a batch to the number of items that its loss is a mean over.
        adds_up: whether losses that were told so many items are parts of a sum.
        devices: the numbers of the GPUs.
    """
    parallel = nn.DataParallel(_Part(module, loss, weigh), device_ids=list(devices))

    def whole(model: nn.Module, batch: Any, count: Tensor | None) -> LossOutput:
        kind = next(module.parameters()).device.type
        if kind == "cuda":
            _seed_others(devices)
        each = None if count is None else torch.as_tensor(count).reshape(1).expand(len(devices))
        losses, weights, metrics = parallel(
            dict(batch), each, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        )
        total, means = combined(losses, weights, metrics, adds_up=adds_up(count))
        return LossOutput(total, None, means)

    whole.__name__ = f"{getattr(loss, '__name__', 'loss')} on {len(devices)} GPUs"
    return whole


def _seed_others(devices: Sequence[int]) -> None:
    """What the other devices draw follows from the seed of the first, which the step has set."""
    generators: Any = torch.cuda.default_generators
    seed = generators[devices[0]].initial_seed()
    for number, device in enumerate(devices[1:], 1):
        generators[device].manual_seed(fold(seed, number))
