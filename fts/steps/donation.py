"""Donation: whether a step reuses the storage of its input state."""

from __future__ import annotations

from typing import Any

import attrs

from fts.steps.batch_context import WithFullBatch
from fts.steps.nonfinite import CheckedStep


def with_donation(step: Any, donate: bool = True) -> Any:
    """The same step with `donate` set, or the step itself where it has no such option.

    Args:
        step: any step. Those of `train_step` and `compile` can donate; a function that a user composed is returned as it is.
        donate: whether to reuse the storage of the input state.

    Returns:
        A step.

    >>> from fts import steps, transforms as tx
    >>> with_donation(steps.train_step(lambda params, batch: params["w"].sum(), tx.sgd(0.1))).donate
    True
    """
    if isinstance(step, (WithFullBatch, CheckedStep)):
        return attrs.evolve(step, step=with_donation(step.step, donate))
    if attrs.has(type(step)) and "donate" in attrs.fields_dict(type(step)):
        return attrs.evolve(step, donate=donate)
    return step
