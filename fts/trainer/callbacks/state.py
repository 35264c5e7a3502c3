"""TrainerState, which callbacks read, TrainerControl, which they set, and states that checkpoints save."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from fts.errors import ArgumentError, CheckpointError
from fts.trainer.reporting import json_default

logger = logging.getLogger(__name__)


class ExportableState:
    """A base for objects whose state is saved in checkpoints: `state()` returns it, and it is restored on resume.

    >>> class Counts(ExportableState):
    ...     def __init__(self, start=0):
    ...         self.start = self.count = start
    ...     def state(self):
    ...         return {"args": {"start": self.start}, "attributes": {"count": self.count}}
    >>> Counts.from_state({"args": {"start": 1}, "attributes": {"count": 5}}).count
    5
    """

    def state(self) -> dict[str, Any]:
        """`{"args": {...}, "attributes": {...}}`: constructor arguments, and attributes to restore; JSON values."""
        raise NotImplementedError(f"{type(self).__name__} must define state().")

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """A new instance from what `state()` returned."""
        instance = cls(**state["args"])
        for name, value in state["attributes"].items():
            setattr(instance, name, value)
        return instance


def is_exportable(callback: Any) -> bool:
    """Whether checkpoints save its state: it derives from `ExportableState`, ours or transformers'."""
    return any(base.__name__ == "ExportableState" for base in type(callback).__mro__)


@dataclass
class TrainerState:
    """The progress of a run, with Hugging Face's names; saved as `trainer_state.json`.

    Attributes:
        epoch: passes over the data, with the fraction of the current one.
        global_step: updates.
        max_steps: updates of the run.
        logging_steps: updates between two logs.
        eval_steps: updates between two evaluations.
        save_steps: updates between two checkpoints.
        train_batch_size: examples in a micro-batch of one process.
        num_train_epochs: passes over the data, rounded up.
        num_input_tokens_seen: tokens that the model was trained on, if `include_num_input_tokens_seen` counts them.
        total_flos: floating point operations of the model.
        log_history: all logs, each with its `step` and `epoch`.
        best_metric: the metric of the best evaluation.
        best_global_step: its step.
        best_model_checkpoint: the path of its checkpoint.
        is_local_process_zero: whether this is the main process of its machine.
        is_world_process_zero: whether this is the main process of all.
        is_hyper_param_search: whether the run is one of a search.
        trial_name: its name in the search.
        trial_params: the hyperparameters of the trial.
        stateful_callbacks: the states of callbacks by class name; may be given as the callbacks themselves.

    >>> TrainerState(global_step=3).global_step
    3
    """

    epoch: float = 0.0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, str | float | int | bool] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log_history = [] if self.log_history is None else self.log_history
        if not isinstance(self.stateful_callbacks, dict):
            self.stateful_callbacks = export_states(self.stateful_callbacks or ())

    def save_to_json(self, json_path: str | Path) -> None:
        """Write the state to a JSON file; values of logs that JSON cannot hold become strings, with a warning.

        Raises:
            CheckpointError: another value cannot be written as JSON.
        """
        try:
            text = self._as_json()
        except (TypeError, ValueError):
            self.log_history[:] = [_to_json_entry(entry) for entry in self.log_history]
            try:
                text = self._as_json()
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{json_path} cannot be written: {error}. Give it numbers and strings only.") from error
        Path(json_path).write_text(text + "\n", encoding="utf-8")

    def _as_json(self) -> str:
        document = {item.name: getattr(self, item.name) for item in fields(self)}
        return json.dumps(document, indent=2, sort_keys=True, default=json_default)

    @classmethod
    def load_from_json(cls, json_path: str | Path) -> TrainerState:
        """Read a file of `save_to_json`, or of Hugging Face's Trainer; unknown keys are ignored.

        Raises:
            CheckpointError: the file is missing or corrupt.
        """
        try:
            document = json.loads(Path(json_path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{json_path} cannot be read: {error}") from error
        if not isinstance(document, dict):
            raise CheckpointError(f"{json_path} holds {type(document).__name__}; it must be an object.")
        known = {item.name for item in fields(cls)}
        _check_fields(document, json_path)
        return cls(**{name: value for name, value in document.items() if name in known})

    def compute_steps(self, args: Any, max_steps: int) -> None:
        """Set `logging_steps`, `eval_steps` and `save_steps` from the arguments, where a value below 1 is a share of all steps.

        Args:
            args: have the three attributes.
            max_steps: updates of the run.
        """
        for name in ("logging_steps", "eval_steps", "save_steps"):
            steps = getattr(args, name)
            if steps is not None:
                setattr(self, name, math.ceil(max_steps * steps) if steps < 1 else steps)

    def init_training_references(self, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any) -> None:
        """Set what is constant during the run.

        Args:
            trainer: has the rank of the process, and the name of a search's trial (`hp_name`).
            max_steps: updates.
            num_train_epochs: passes over the data.
            trial: the trial of a search, an object with `params` or a dictionary; or None.
        """
        current_trial = getattr(trainer, "_trial", None)
        if getattr(trainer, "hp_name", None) is not None and current_trial is not None:
            self.trial_name = trainer.hp_name(current_trial)
        self.trial_params = None if trial is None else dict(getattr(trial, "params", trial))
        self.max_steps = max_steps
        self.num_train_epochs = num_train_epochs
        self.is_local_process_zero = trainer.is_local_process_zero()
        self.is_world_process_zero = trainer.is_world_process_zero()


@dataclass
class TrainerControl(ExportableState):
    """Requests of callbacks to the run: flags that they set to True.

    Attributes:
        should_training_stop: end the run after this step.
        should_epoch_stop: end the current epoch after this step; cleared when the next one begins.
        should_save: write a checkpoint after this step; cleared when the next step begins, as are the following.
        should_evaluate: evaluate.
        should_log: log the metrics since the last log.

    >>> control = TrainerControl(should_log=True)
    >>> control._new_step()
    >>> control.should_log
    False
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False

    def _new_training(self) -> None:
        self.should_training_stop = False

    def _new_epoch(self) -> None:
        self.should_epoch_stop = False

    def _new_step(self) -> None:
        self.should_save = self.should_evaluate = self.should_log = False

    def state(self) -> dict[str, Any]:
        """The flags, which checkpoints save."""
        return {"args": asdict(self), "attributes": {}}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True, default=json_default)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _to_json_entry(entry: Any) -> Any:
    """A log as a JSON value: a run must not end because of what a callback logged."""
    if _is_json(entry):
        return entry
    if not isinstance(entry, dict):
        logger.warning("The log history has %s, which JSON cannot hold: it is saved as a string.", type(entry).__name__)
        return {"text": str(entry)}
    for name, value in entry.items():
        if not _is_json({name: value}):
            logger.warning("The log history has %r: %.80r, which JSON cannot hold: it is saved as a string.", name, value)
    return {str(name): value if _is_json(value) else str(value) for name, value in entry.items()}


def export_states(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The states of callbacks by class name; a list where several have the same class.

    Raises:
        ArgumentError: one has no `state()`, or its state is not a dictionary that JSON can hold.
    """
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        states.setdefault(type(callback).__name__, []).append(_export_state(callback))
    return {name: found[0] if len(found) == 1 else found for name, found in states.items()}


def _export_state(callback: Any) -> dict[str, Any]:
    name = type(callback).__name__
    if not is_exportable(callback):
        raise ArgumentError(f"{name} has no state to save: derive it from ExportableState and define state().")
    state = callback.state()
    if not isinstance(state, dict):
        raise ArgumentError(f'{name}.state() returned {state!r}; it must return {{"args": ..., "attributes": ...}}.')
    try:
        return dict(json.loads(json.dumps(state, default=json_default)))  # a copy, as a checkpoint restores it
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{name}.state() returned what JSON cannot hold ({error}): use numbers, strings, lists and dictionaries."
        ) from error


_FIELD_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "epoch": ((int, float), "a number"),
    "global_step": (int, "a whole number"),
    "max_steps": (int, "a whole number"),
    "train_batch_size": ((int, type(None)), "a whole number"),
    "num_input_tokens_seen": (int, "a whole number"),
    "total_flos": ((int, float), "a number"),
    "log_history": (list, "a list"),
    "best_metric": ((int, float, type(None)), "a number"),
    "best_global_step": ((int, type(None)), "a whole number"),
    "best_model_checkpoint": ((str, type(None)), "a string"),
    "stateful_callbacks": ((dict, type(None)), "an object"),
}
"""Field that a resumed run reads -> its type, and the words for it in an error."""


def _check_fields(document: dict[str, Any], path: str | Path) -> None:
    for name, (kind, text) in _FIELD_TYPES.items():
        value = document.get(name)
        if name in document and (isinstance(value, bool) or not isinstance(value, kind)):
            raise CheckpointError(f"{path} is corrupt: {name} is {value!r}; it must be {text}.")
