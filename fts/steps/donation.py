"""Whether a step reuses the storage of the state it is given."""

from __future__ import annotations

from typing import Any

import attrs

from fts.steps.finite import NoticingStep
from fts.steps.passing import Passing


def donating(step: Any, donate: bool = True) -> Any:
    """The same step with `donate` set, or the step itself where it has no such choice.

    Args:
        step: any step. Those that `train_step` and `compile` make can donate; a function that a user composed decides
            for itself.
        donate: whether to reuse the storage of the state that is given.

    Returns:
        A step.

    >>> from fts import steps, transforms as tx
    >>> donating(steps.train_step(lambda params, batch: params["w"].sum(), tx.sgd(0.1))).donate
    True
    """
    if isinstance(step, (Passing, NoticingStep)):
        return attrs.evolve(step, step=donating(step.step, donate))
    if attrs.has(type(step)) and "donate" in attrs.fields_dict(type(step)):
        return attrs.evolve(step, donate=donate)
    return step
