"""A step that can be replaced while a loop runs."""

from __future__ import annotations

from typing import Any

import attrs

from fts.typing import Batch, Info, Metrics


@attrs.define(eq=False)
class SwappableStep:
    """Runs its `step`, an attribute that can be set to another one.

    `with_donation` returns it unchanged, so give it a step that donates already.

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
        """Call the `check` of the step, if it has one."""
        check = getattr(self.step, "check", None)
        if check is not None:
            check(info)
