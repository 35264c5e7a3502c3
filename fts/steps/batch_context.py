"""Arguments of the loss that are computed from the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from fts.typing import Batch, Info, Metrics


@attrs.frozen(eq=False)
class WithFullBatch:
    """A step that hands its loss something about the whole batch; made by `with_full_batch`."""

    step: Any
    fn: Callable[[Batch], Sequence[Any]]

    def __call__(self, state: Any, batch: Batch, *args: Any) -> tuple[Any, Metrics]:
        result: tuple[Any, Metrics] = self.step(state, batch, *self.fn(batch), *args)
        return result

    @property
    def transform(self) -> Any:
        """That of the step; what makes its state."""
        return self.step.transform

    def check(self, info: Info) -> None:
        """As the step's own `check`, if it has one."""
        check = getattr(self.step, "check", None)
        if check is not None:
            check(info)


def with_full_batch(step: Any, fn: Callable[[Batch], Sequence[Any]]) -> WithFullBatch:
    """A step whose loss is given, behind each micro-batch, what `fn` computes from the whole batch.

    Args:
        step: what `train_step` or `compile` made.
        fn: from the batch (all of its `MicroBatches`) to a sequence of arguments, such as the number of tokens in all of them.
            It runs outside the graph of a compiled step, on its tensors' device, and should not read them.

    Returns:
        A step: `(state, batch, *args) -> (state, metrics)`.

    >>> import fts, torch
    >>> from fts import steps, transforms as tx
    >>> def loss(params, batch, total):  # a sum over tokens, divided by their number in the whole batch
    ...     return (params["w"] * batch).sum() / total * 2, 1
    >>> step = with_full_batch(steps.train_step(loss, tx.sgd(1.0)), lambda micro: [sum(part.numel() for part in micro)])
    >>> batch = steps.MicroBatches([torch.ones(1), torch.ones(3)])
    >>> step(fts.TrainState.create({"w": torch.tensor([1.0])}, tx.sgd(1.0)), batch)[0].params["w"]
    tensor([0.])
    """
    return WithFullBatch(step, fn)
