"""A step that can be exchanged for another one while a loop runs."""

from __future__ import annotations

from typing import Any

import attrs

from fts.typing import Batch, Info, Metrics


@attrs.define(eq=False)
class SwappableStep:
    """Runs the step that it holds; put another one in its place to go on with that.

    It stays the same object where states are donated, so give it a step that donates already.

    >>> step = SwappableStep(lambda state, batch: (state + batch, {}))
    >>> step.step = lambda state, batch: (state - batch, {})
    >>> step(1, 2)
    (-1, {})
    """

    step: Any

    def __call__(self, state: Any, batch: Batch, *args: Any) -> tuple[Any, Metrics]:
        result: tuple[Any, Metrics] = self.step(state, batch, *args)
        return result

    def check(self, info: Info) -> None:
        """As the step's own `check`, if it has one."""
        check = getattr(self.step, "check", None)
        if check is not None:
            check(info)
