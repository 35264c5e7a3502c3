"""The trials of a search as lines of a table, one when each is over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fts.trainer.search.objective import Objective

HEAD = f"{'trial':>5}  {'state':<8}  {'objective':<12}  parameters"


def line(number: int, state: str, objective: Objective | None, params: Mapping[str, Any]) -> str:
    """A trial as a line.

    Args:
        number: of the trial.
        state: such as "complete".
        objective: None where there is none.
        params: what the search chose, by name.

    >>> print(HEAD + chr(10) + line(3, "pruned", 0.123456, {"learning_rate": 1e-05, "seed": 4}))
    trial  state     objective     parameters
        3  pruned    0.1235        learning_rate=1e-05 seed=4
    """
    values = objective if isinstance(objective, list) else [] if objective is None else [objective]
    shown = " ".join(f"{value:.4g}" for value in values) or "-"
    chosen = " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items())
    return f"{number:>5}  {state:<8}  {shown:<12}  {chosen}"
