"""The mean loss over the batches of an evaluation."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from fts.typing import Number


@attrs.define
class MeanLoss:
    """The weighted mean of losses; sums stay on the device, and are read once.

    >>> mean = MeanLoss()
    >>> mean.update(torch.tensor(1.0), 2), mean.update(torch.tensor(torch.nan), 1)
    (None, None)
    >>> mean.compute(skip_nonfinite=True)
    {'loss': 1.0}
    """

    sums: Tensor | None = None
    losses: list[Tensor] = attrs.field(factory=list)
    weights: list[Number] = attrs.field(factory=list)

    def update(self, loss: Tensor | None, weight: Number) -> None:
        """Add a mean loss with its weight, or several losses with as many weights."""
        if loss is None:
            return
        per_example = isinstance(weight, Tensor) and weight.shape == loss.shape
        self.losses.append(loss if per_example or loss.ndim == 0 else loss.mean())
        self.weights.append(weight)
        if len(self.losses) == 256:  # many at a time, because small operations cost as much as large ones
            self._sum()

    def compute(self, *, skip_nonfinite: bool = False) -> dict[str, float]:
        """The mean as "loss"; empty if there was no loss. It is NaN where the weights are 0."""
        self._sum()
        if self.sums is None:
            return {}
        total, weight, finite_total, finite_weight = self.sums.tolist()
        if skip_nonfinite and finite_weight:
            total, weight = finite_total, finite_weight
        return {"loss": total / weight if weight else float("nan")}

    def _sum(self) -> None:
        if not self.losses:
            return
        losses = torch.cat([loss.reshape(-1) for loss in self.losses])
        wide = torch.float32 if losses.device.type == "mps" else torch.float64  # MPS has no float64
        losses, weights = losses.to(wide), _concatenate(self.weights, wide).to(losses.device)
        amounts = torch.where(weights == 0, 0.0, losses * weights)  # a mean of weight 0 is NaN, and adds nothing
        finite = torch.isfinite(amounts)
        parts = amounts, weights, torch.where(finite, amounts, 0.0), torch.where(finite, weights, 0.0)
        sums = torch.stack([part.sum() for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums
        self.losses, self.weights = [], []


def _concatenate(weights: list[Number], dtype: torch.dtype) -> Tensor:
    if not any(isinstance(weight, Tensor) for weight in weights):
        return torch.tensor(weights, dtype=dtype)
    return torch.cat([torch.as_tensor(weight, dtype=dtype).reshape(-1) for weight in weights])
