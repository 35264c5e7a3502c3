"""The loss of a batch, from the model itself or from a function of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from fts import steps
from fts.errors import BatchError
from fts.steps import ModuleLoss
from fts.typing import LossOutput, Number


@attrs.frozen
class Loss:
    """How the loss of a batch is computed.

    Attributes:
        label_names: the batch's keys that are labels.
        fn: `fn(outputs, labels, num_items_in_batch=...)`, Hugging Face's `compute_loss_func`; None: the model computes its own.
    """

    label_names: Sequence[str]
    fn: Callable[..., Any] | None = None

    @property
    def __name__(self) -> str:
        return "the model's own loss" if self.fn is None else str(getattr(self.fn, "__name__", type(self.fn).__name__))

    def forward(self, model: Any, batch: Mapping[str, Any]) -> tuple[Any, Tensor | None]:
        """Run a model; its outputs, and the loss, or None if it returned none."""
        if self.fn is None:
            outputs = model(**batch)
            return outputs, steps.loss_in(outputs)
        inputs = {name: value for name, value in batch.items() if name not in self.label_names}
        found = [batch[name] for name in self.label_names if name in batch]
        outputs = model(**inputs)
        labels = found[0] if len(found) == 1 else tuple(found) or None
        return outputs, self.fn(outputs, labels, num_items_in_batch=item_count(model, batch, self.label_names))

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """The loss as the core wants it: with the number of items that its mean runs over."""
        if not isinstance(batch, Mapping):
            raise BatchError(
                f"The Trainer calls model(**batch), so a batch must be a dictionary, not {type(batch).__name__}. "
                "Return dictionaries from the data_collator."
            )
        _, loss = self.forward(model, batch)
        return LossOutput(loss, item_count(model, batch, self.label_names))  # type: ignore[arg-type]  # the core checks it


def train_loss(model: nn.Module, loss: Loss) -> ModuleLoss:
    """The loss of a training step."""
    return steps.module_loss(model) if loss.fn is None else steps.module_loss(model, loss)


def item_count(model: nn.Module, batch: Mapping[str, Any], label_names: Sequence[str]) -> Number:
    """Over how many items a batch's mean loss runs: labels that count where labels are tokens, else rows.

    >>> import torch
    >>> item_count(nn.Linear(2, 1), {"x": torch.zeros(4, 2), "labels": torch.zeros(4)}, ["labels"])
    4
    """
    count = steps.label_count(model, batch.get(label_names[0])) if label_names else None
    return (steps.rows(batch) or 1) if count is None else count
