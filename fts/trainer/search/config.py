"""The configuration of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from fts.errors import ArgumentError
from fts.trainer.search.objective import default_compute_objective

DIRECTIONS = ("minimize", "maximize")


def _or_default(compute: Callable[[dict[str, float]], Any] | None) -> Callable[[dict[str, float]], Any]:
    return compute or default_compute_objective


@attrs.frozen
class SearchConfig:
    """The arguments of a search, without its backend's.

    Attributes:
        hp_space: trial -> values by name; None for the backend's default.
        compute_objective: metrics of an evaluation -> objective, or several; None for the default.
        n_trials: how many trials.
        direction: "minimize" or "maximize", or a list with one for each objective.
        hp_name: trial -> its name.

    >>> SearchConfig(direction=["minimize", "maximize"]).directions
    ('minimize', 'maximize')
    """

    hp_space: Callable[[Any], dict[str, Any]] | None = None
    compute_objective: Callable[[dict[str, float]], Any] = attrs.field(default=None, converter=_or_default)
    n_trials: int = 20
    direction: str | Sequence[str] = "minimize"
    hp_name: Callable[[Any], str] | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        """The direction of each objective."""
        return (self.direction,) if isinstance(self.direction, str) else tuple(self.direction)

    def check(self) -> None:
        """Check the values.

        Raises:
            ArgumentError: `n_trials` or `direction` is wrong.
        """
        if isinstance(self.n_trials, bool) or not isinstance(self.n_trials, int) or self.n_trials < 1:
            raise ArgumentError(f"n_trials={self.n_trials!r}: it must be a whole number above 0.")
        if not self.directions or any(direction not in DIRECTIONS for direction in self.directions):
            raise ArgumentError(f"direction={self.direction!r}: it must be 'minimize' or 'maximize', or a list of these.")
