"""What callbacks see of a run, and what they can ask of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fts.errors import CheckpointError

STATE_FILE = "trainer_state.json"


class ExportableState:
    """A callback whose state is kept in checkpoints: `state()` gives it, and it is set again on resume."""

    def state(self) -> dict[str, Any]:
        """`{"args": {...}, "attributes": {...}}`: constructor arguments, and attributes to set again; JSON values."""
        raise NotImplementedError(f"{type(self).__name__} must define state().")


@dataclass
class TrainerState:
    """How far a run has come, in Hugging Face's terms; saved as `trainer_state.json`.

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

    def save_to_json(self, json_path: str | Path) -> None:
        """Write the state to a JSON file."""
        Path(json_path).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load_from_json(cls, json_path: str | Path) -> TrainerState:
        """Read what `save_to_json` wrote, or what Hugging Face's Trainer did.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        try:
            document = json.loads(Path(json_path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{json_path} cannot be read: {error}") from error
        if not isinstance(document, dict):
            raise CheckpointError(f"{json_path} holds {type(document).__name__}; it must be an object.")
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in document.items() if name in known})


@dataclass
class TrainerControl:
    """What a callback can ask of the run, by setting a flag to True."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False
