"""Which search a trial belongs to, and how a search goes on whose process is gone.

A study keeps, for each search, the process that runs it; each trial says which search it belongs to. A search that finds another
one in the study whose process has died ends that one's unfinished trials as failed, and does what was left of it.
"""

from __future__ import annotations

import logging
import os
import platform
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

_SEARCH = "fts:search"
_ENDED = "fts:ended"


@attrs.frozen
class Record:
    """A search in its study.

    Attributes:
        study: the study.
        name: of the search.
        done: how many of its trials had come to an end before.
    """

    study: optuna.Study
    name: str
    done: int

    @classmethod
    def begin(cls, study: optuna.Study, n_trials: int) -> Record:
        """Go on with an interrupted search of the study, or begin one.

        Args:
            study: may be new.
            n_trials: how many trials are asked for.
        """
        _end_dead_trials(study)
        name = _interrupted(study)
        done = 0 if name is None else _count(study, name)
        if name is not None:
            logger.warning("The search goes on: %s of %s trials were done when its process ended.", done, n_trials)
        record = cls(study, name or uuid.uuid4().hex, done)
        study.set_user_attr(record.key, {"process": _this_process(), "over": False})
        return record

    @property
    def key(self) -> str:
        """Of the study's attribute."""
        return f"{_SEARCH}:{self.name}"

    def left(self, n_trials: int) -> int:
        """How many of so many trials are still to run."""
        return max(0, n_trials - self.done)

    def mark(self, trial: optuna.Trial) -> None:
        """Note that a trial belongs to this search."""
        trial.set_user_attr(_SEARCH, self.name)

    def mark_ended(self, trial: optuna.Trial) -> None:
        """Note that a trial which optuna will record as failed came to its end, and is not to be done again."""
        trial.set_user_attr(_ENDED, True)

    def end(self) -> None:
        """Note that nothing is left to do."""
        self.study.set_user_attr(self.key, {"process": _this_process(), "over": True})


def _end_dead_trials(study: optuna.Study) -> None:
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        found = study.user_attrs.get(f"{_SEARCH}:{trial.user_attrs.get(_SEARCH)}")
        if found is None or _may_live(found["process"]):
            logger.info("Trial %s is still running, in another process.", trial.number)
            continue
        logger.warning("Trial %s was running when its process ended: it failed.", trial.number)
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)  # another process may do the same


def _interrupted(study: optuna.Study) -> str | None:
    for key, found in study.user_attrs.items():
        if key.startswith(f"{_SEARCH}:") and not found["over"] and not _may_live(found["process"]):
            return str(key).removeprefix(f"{_SEARCH}:")
    return None


def _count(study: optuna.Study, name: str) -> int:
    from optuna.trial import TrialState

    own = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get(_SEARCH) == name]
    return sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or _ENDED in trial.user_attrs for trial in own)


def _this_process() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def _may_live(process: dict[str, Any]) -> bool:
    """Whether a process may still run; nobody knows of another machine's."""
    if process["host"] != platform.node():
        return True
    if process["pid"] == os.getpid():
        return False  # an earlier search of this process has left its study
    start = _start_of(process["pid"])
    if start is not None and process["start"] is not None:
        return bool(start == process["start"])
    return start is not None or _answers(process["pid"])


def _start_of(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None where there is none, or nothing tells."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _answers(pid: int) -> bool:
    if Path("/proc/self/stat").exists():
        return False  # it would have told
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
