"""Data parallelism over several GPUs of one process (torch's DataParallel)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fts.randomness import fold_in
from fts.steps.losses import as_loss_output
from fts.typing import LossOutput, Number


class _ReplicaLoss(nn.Module):
    """The loss of a chunk of the batch, as a module that DataParallel replicates on each device."""

    def __init__(self, module: nn.Module, loss: Callable[..., Any], weight_fn: Callable[[Any], Number]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss
        self.weight_fn = weight_fn

    def forward(self, batch: Any, count: Tensor | None, device_type: str, dtype: torch.dtype, autocast: bool) -> Any:
        with torch.autocast(device_type, dtype, enabled=autocast):  # autocast is thread-local, and each device has its own thread
            output = as_loss_output(self.loss(self.module, batch, None if count is None else count[0]))
        weight = _scalar(self.weight_fn(batch), output.loss)
        # a mean over no examples is NaN, and so is its gradient
        loss = output.loss if weight else torch.zeros_like(output.loss)
        metrics = {
            name: tuple(_scalar(number, weight)[None] for number in (value if isinstance(value, tuple) else (value, weight)))
            for name, value in output.metrics.items()
        }
        return loss[None], weight[None], metrics


def _scalar(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).detach()


def combine_losses(
    losses: Tensor, weights: Tensor, metrics: Mapping[str, tuple[Tensor, Tensor]], *, is_sum: bool
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss and the metrics of a batch from those of its chunks.

    Args:
        losses: of the chunks, [chunks].
        weights: over how many examples these are means, [chunks].
        metrics: by name the means of the chunks and their weights, each [chunks].
        is_sum: whether the losses are terms of a sum rather than means.

    Returns:
        The loss, `sum(w l) / sum(w)` or the plain sum, and by name the mean of a metric and its weight.

    >>> combine_losses(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]), {}, is_sum=False)
    (tensor(2.), {})
    """
    means = {}
    for name, (values, counts) in metrics.items():
        means[name] = (torch.where(counts == 0, 0, values * counts).sum() / counts.sum(), counts.sum())
    total = losses.sum() if is_sum else ((losses * weights).sum() / weights.sum()).to(losses.dtype)
    return total, means


def data_parallel_loss(
    module: nn.Module,
    loss: Callable[[nn.Module, Any, Tensor | None], Any],
    weight_fn: Callable[[Any], Number],
    is_sum: Callable[[Tensor | None], bool],
    devices: Sequence[int],
) -> Callable[[nn.Module, Any, Tensor | None], LossOutput]:
    """The loss of a module, with each chunk of the batch on its own GPU.

    Args:
        module: on the first device; the others get a copy for each pass.
        loss: `(model, batch, count)` -> a loss in any of the forms of `fts.typing.LossFn`; batches are dictionaries.
        weight_fn: from a chunk of a batch to the number of examples that its loss is a mean over.
        is_sum: from the count that the loss gets to whether the losses are terms of a sum.
        devices: the indices of the GPUs.
    """
    parallel = nn.DataParallel(_ReplicaLoss(module, loss, weight_fn), device_ids=list(devices))

    def parallel_loss(model: nn.Module, batch: Any, count: Tensor | None) -> LossOutput:
        device_type = next(module.parameters()).device.type
        if device_type == "cuda":
            _seed_other_devices(devices)
        counts = None if count is None else torch.as_tensor(count).reshape(1).expand(len(devices))
        losses, weights, metrics = parallel(
            dict(batch), counts, device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
        )
        total, means = combine_losses(losses, weights, metrics, is_sum=is_sum(count))
        return LossOutput(total, None, means)

    parallel_loss.__name__ = f"{getattr(loss, '__name__', 'loss')} on {len(devices)} GPUs"
    return parallel_loss


def _seed_other_devices(devices: Sequence[int]) -> None:
    """Seed the other devices from the seed of the first, which the step has set."""
    generators: Any = torch.cuda.default_generators
    seed = generators[devices[0]].initial_seed()
    for number, device in enumerate(devices[1:], 1):
        generators[device].manual_seed(fold_in(seed, number))
