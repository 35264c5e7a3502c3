"""Loss arguments that are computed from the full batch, across its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from fts.typing import Batch, Info, Metrics


@attrs.frozen(eq=False)
class WithFullBatch:
    """A step whose loss also gets values computed from the full batch; made by `with_full_batch`."""

    step: Any
    fn: Callable[[Batch], Sequence[Any]]

    def __call__(self, state: Any, batch: Batch, *args: Any) -> tuple[Any, Metrics]:
        result: tuple[Any, Metrics] = self.step(state, batch, *self.fn(batch), *args)
        return result

    @property
    def transform(self) -> Any:
        """The transform of the step, which its state is created with."""
        return self.step.transform

    def check(self, info: Info) -> None:
        """Call the `check` of the step, if it has one."""
        check = getattr(self.step, "check", None)
        if check is not None:
            check(info)


def with_full_batch(step: Any, fn: Callable[[Batch], Sequence[Any]]) -> WithFullBatch:
    """A step whose loss gets, after each micro-batch, the arguments that `fn` computes from the full batch.

    Args:
        step: from `train_step` or `compile`.
        fn: from the batch (all of its `MicroBatches`) to a sequence of arguments, such as the total number of tokens.
            It runs outside the graph of a compiled step, on the device of its tensors, and should not synchronize with it.

    Returns:
        A step: `(state, batch, *args) -> (state, metrics)`.

    >>> import fts, torch
    >>> from fts import steps, transforms as tx
    >>> def loss(params, batch, total):  # a sum over tokens, divided by their number in the full batch
    ...     return (params["w"] * batch).sum() / total * 2, 1
    >>> step = with_full_batch(steps.train_step(loss, tx.sgd(1.0)), lambda micro: [sum(part.numel() for part in micro)])
    >>> batch = steps.MicroBatches([torch.ones(1), torch.ones(3)])
    >>> step(fts.TrainState.create({"w": torch.tensor([1.0])}, tx.sgd(1.0)), batch)[0].params["w"]
    tensor([0.])
    """
    return WithFullBatch(step, fn)
