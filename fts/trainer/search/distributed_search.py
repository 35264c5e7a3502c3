"""Searches in several processes: the first one runs the study, and all train each trial together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from fts.distributed.process_group import Group
from fts.errors import DistributedError, NonFiniteError
from fts.trainer.search.objective import Reports
from fts.trainer.search.trials import run_trial

if TYPE_CHECKING:
    from fts.trainer.search.hyperparameter_search import Asked
    from fts.trainer.trainer import Trainer

Result = TypeVar("Result")


@attrs.frozen
class Turn:
    """A trial, as it is told to the others.

    Attributes:
        values: the arguments that the search chose, by name.
        trial: what `model_init` and `hp_name` get: an object with `number` and `params`.
    """

    values: Mapping[str, Any]
    trial: Any


@attrs.frozen
class Failed:
    """The end of a search by an error of the first process.

    Attributes:
        problem: the error, in words.
    """

    problem: str


@attrs.define
class Lead:
    """The first process, as it leads the others through the trials; alone it leads nobody.

    Attributes:
        group: the processes.
        training: whether they are in a trial, and hear of nothing else.
    """

    group: Group
    training: bool = attrs.field(default=False, init=False)

    @contextmanager
    def trial(self, values: Mapping[str, Any], trial: Any) -> Iterator[None]:
        """A block in which all train a trial; an error that one of them may meet alone ends the search.

        Args:
            values: the arguments that the search chose, by name; they can be pickled.
            trial: see `Turn`.
        """
        if self.training and self.group.size > 1:
            raise DistributedError("A trial ended in the first process alone; the others may still train it, so the search ends.")
        self.group.broadcast(Turn(values, trial))
        self.training = True
        try:
            yield
        except NonFiniteError:  # of sums over all processes, so that all of them meet it
            self.training = False
            raise
        self.training = False


def lead(group: Group, run: Callable[[Lead], Result]) -> Result:
    """Run a study in the first process, and tell the others what came of it.

    Args:
        group: the processes.
        run: runs the study; its result can be pickled.
    """
    leading = Lead(group)
    try:
        found = run(leading)
    except BaseException as error:
        if not leading.training:  # else the others meet the error themselves, or lose the connection to this process
            group.broadcast(Failed(f"{type(error).__name__}: {error}"))
        raise
    group.broadcast(found)
    return found


def follow(trainer: Trainer, asked: Asked) -> Any:
    """Train what the first process tells, in one of the others; the result of the search.

    Args:
        trainer: what each trial starts from.
        asked: what the search is asked for.

    Raises:
        DistributedError: the search failed in the first process.
    """
    group = trainer.world
    while isinstance(told := group.broadcast(None), Turn):
        reports = Reports(asked.compute_objective, len(asked.directions), _never, group)
        run_id = str(told.trial.number)
        try:
            run_trial(trainer, told.values, told.trial, run_id=run_id, hp_name=asked.hp_name, reports=reports)
        except NonFiniteError:  # a bad trial; the first process records it
            continue
    if isinstance(told, Failed):
        raise DistributedError(f"The search failed in the first process, so this one ends, too. {told.problem}")
    return told


def _never(objective: Any, metrics: Any, step: int) -> bool:
    raise AssertionError("the first process decides")
