"""The table of a search's trials: one line for each trial that has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fts.trainer.search.objective import Objective

HEADER = f"{'trial':>5}  {'state':<8}  {'objective':<12}  parameters"


def format_trial(number: int, state: str, objective: Objective | None, params: Mapping[str, Any]) -> str:
    """A trial as a line of the table.

    Args:
        number: of the trial.
        state: such as "complete".
        objective: None if there is none.
        params: what the search chose, by name.

    >>> print(HEADER + chr(10) + format_trial(3, "pruned", 0.123456, {"learning_rate": 1e-05, "seed": 4}))
    trial  state     objective     parameters
        3  pruned    0.1235        learning_rate=1e-05 seed=4
    """
    values = objective if isinstance(objective, list) else [] if objective is None else [objective]
    shown = " ".join(f"{value:.4g}" for value in values) or "-"
    chosen = " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items())
    return f"{number:>5}  {state:<8}  {shown:<12}  {chosen}"
