"""Searches on several ranks: the main process runs the study, and all ranks train each trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import attrs

from fts.distributed.process_group import Group
from fts.errors import DistributedError, NonFiniteError
from fts.trainer.search.config import SearchConfig
from fts.trainer.search.objective import TrialReporter
from fts.trainer.search.searchable_trainer import SearchableTrainer
from fts.trainer.search.trials import run_trial

Result = TypeVar("Result")


@attrs.frozen
class TrialMessage:
    """A trial, as the main process broadcasts it.

    Attributes:
        values: the arguments that the search chose, by name.
        trial: what `model_init` and `hp_name` get: an object with `number` and `params`.
    """

    values: Mapping[str, Any]
    trial: Any


@attrs.frozen
class SearchFailed:
    """The end of a search by an error of the main process.

    Attributes:
        problem: a description of the error.
    """

    problem: str


@attrs.define
class TrialBroadcaster:
    """The main process's side of a distributed search; with one process it broadcasts nothing.

    Attributes:
        group: all ranks.
        training: whether all ranks are in a trial, and receive no other message.
    """

    group: Group
    training: bool = attrs.field(default=False, init=False)

    @contextmanager
    def trial(self, values: Mapping[str, Any], trial: Any) -> Iterator[None]:
        """A block in which all ranks train a trial; an error that only some ranks may raise ends the search.

        Args:
            values: the arguments that the search chose, by name; they can be pickled.
            trial: see `TrialMessage`.
        """
        if self.training and self.group.size > 1:
            raise DistributedError("A trial ended on the main process alone; other ranks may still train it, so the search ends.")
        self.group.broadcast_object(TrialMessage(values, trial))
        self.training = True
        try:
            yield
        except NonFiniteError:  # of sums over all ranks, so that all of them raise it
            self.training = False
            raise
        self.training = False


def run_on_main(group: Group, run_study: Callable[[TrialBroadcaster], Result]) -> Result:
    """Run a study on the main process, and broadcast its result.

    Args:
        group: all ranks.
        run_study: runs the study; its result can be pickled.
    """
    broadcaster = TrialBroadcaster(group)
    try:
        result = run_study(broadcaster)
    except BaseException as error:
        if not broadcaster.training:  # else the other ranks raise the error themselves, or lose the connection to this one
            group.broadcast_object(SearchFailed(f"{type(error).__name__}: {error}"))
        raise
    group.broadcast_object(result)
    return result


def train_broadcast_trials(trainer: SearchableTrainer, config: SearchConfig) -> Any:
    """Train the trials that the main process broadcasts, on another rank; returns the result of the search.

    Args:
        trainer: each trial trains a copy of it.
        config: what to search for.

    Raises:
        DistributedError: the search failed on the main process.
    """
    group = trainer.world
    while isinstance(message := group.broadcast_object(None), TrialMessage):
        reporter = TrialReporter(config.compute_objective, len(config.directions), _decide_on_main, group)
        run_id = str(message.trial.number)
        try:
            run_trial(trainer, message.values, message.trial, run_id=run_id, hp_name=config.hp_name, reporter=reporter)
        except NonFiniteError:  # a bad trial; the main process records it
            continue
    if isinstance(message, SearchFailed):
        raise DistributedError(f"The search failed on the main process, so this rank ends, too. {message.problem}")
    return message


def _decide_on_main(objective: Any, metrics: Any, step: int) -> bool:
    raise AssertionError("the main process decides")
