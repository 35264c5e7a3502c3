"""Which search a trial belongs to, and how a search resumes after its process died.

A study records the process of each search, and the search of each trial. If a new search finds one in the study whose process has
died, it records that one's running trials as failed, and runs its remaining trials.
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

_SEARCH_KEY = "fts:search"
_ENDED_KEY = "fts:ended"


@attrs.frozen
class SearchRecord:
    """A search in its study.

    Attributes:
        study: the study.
        name: of the search.
        done: how many of its trials had ended before it resumed.
    """

    study: optuna.Study
    name: str
    done: int

    @classmethod
    def start_or_resume(cls, study: optuna.Study, n_trials: int) -> SearchRecord:
        """Resume an interrupted search of the study, or start one.

        Args:
            study: may be new.
            n_trials: how many trials are requested.
        """
        _fail_abandoned_trials(study)
        name = _interrupted_search(study)
        done = 0 if name is None else _count_ended(study, name)
        if name is not None:
            logger.warning("The search resumes: %s of %s trials were done when its process ended.", done, n_trials)
        record = cls(study, name or uuid.uuid4().hex, done)
        study.set_user_attr(record.key, {"process": _current_process(), "over": False})
        return record

    @property
    def key(self) -> str:
        """The name of the study's attribute."""
        return f"{_SEARCH_KEY}:{self.name}"

    def remaining(self, n_trials: int) -> int:
        """How many of `n_trials` are still to run."""
        return max(0, n_trials - self.done)

    def add_trial(self, trial: optuna.Trial) -> None:
        """Record that a trial belongs to this search."""
        trial.set_user_attr(_SEARCH_KEY, self.name)

    def mark_ended(self, trial: optuna.Trial) -> None:
        """Record that a trial ended and is not to be repeated, although optuna will record it as failed."""
        trial.set_user_attr(_ENDED_KEY, True)

    def end(self) -> None:
        """Record that no trials remain."""
        self.study.set_user_attr(self.key, {"process": _current_process(), "over": True})


def _fail_abandoned_trials(study: optuna.Study) -> None:
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        search = study.user_attrs.get(f"{_SEARCH_KEY}:{trial.user_attrs.get(_SEARCH_KEY)}")
        if search is None or _may_be_running(search["process"]):
            logger.info("Trial %s is still running, in another process.", trial.number)
            continue
        logger.warning("Trial %s was running when its process ended: it is recorded as failed.", trial.number)
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)  # another process may do the same


def _interrupted_search(study: optuna.Study) -> str | None:
    for key, search in study.user_attrs.items():
        if key.startswith(f"{_SEARCH_KEY}:") and not search["over"] and not _may_be_running(search["process"]):
            return str(key).removeprefix(f"{_SEARCH_KEY}:")
    return None


def _count_ended(study: optuna.Study, name: str) -> int:
    from optuna.trial import TrialState

    own = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get(_SEARCH_KEY) == name]
    return sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or _ENDED_KEY in trial.user_attrs for trial in own)


def _current_process() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "start": _start_time(os.getpid())}


def _may_be_running(process: dict[str, Any]) -> bool:
    """Whether a process may still be running; True for those of other machines."""
    if process["host"] != platform.node():
        return True
    if process["pid"] == os.getpid():
        return False  # it is an earlier search of this process
    start = _start_time(process["pid"])
    if start is not None and process["start"] is not None:
        return bool(start == process["start"])
    return start is not None or _exists(process["pid"])


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it does not exist or the system does not say."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _exists(pid: int) -> bool:
    if Path("/proc/self/stat").exists():
        return False  # it would have been listed there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
