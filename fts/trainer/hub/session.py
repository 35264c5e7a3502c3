"""What a trainer keeps for its pushes, and what a push reads and calls of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import attrs

from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import TrainerState
from fts.trainer.hub.repository import Repository
from fts.trainer.hub.upload_queue import UploadQueue

END_OF_TRAINING = "End of training"
"""The message of a commit that has no other one."""


class PushableTrainer(Protocol):
    """What a push reads of a trainer, and the methods that it calls, which a subclass may override."""

    args: TrainingArguments
    state: TrainerState

    @property
    def save_model(self) -> Callable[..., None]: ...

    @property
    def create_model_card(self) -> Callable[..., None]: ...

    def init_hf_repo(self) -> None: ...

    def is_world_process_zero(self) -> bool: ...

    def _call_event(self, event: str) -> None: ...


@attrs.define(eq=False)
class HubSession:
    """The repository of a trainer, and its uploads.

    Attributes:
        repository: None until it was created or found.
        uploads: of this trainer.

    >>> HubSession().repo_id is None
    True
    """

    repository: Repository | None = None
    uploads: UploadQueue = attrs.field(factory=UploadQueue)

    @property
    def repo_id(self) -> str | None:
        """The repository's full name, with its owner; None until the Hub has returned it."""
        return None if self.repository is None else self.repository.id


def _message(message: str | None) -> str:
    return message or END_OF_TRAINING


@attrs.frozen
class PushOptions:
    """The arguments of a push.

    Attributes:
        message: of the commit; `END_OF_TRAINING` if it is empty or None.
        blocking: whether to wait for it.
        token: instead of `hub_token`.
        revision: the branch, instead of `hub_revision`.
        private: whether a new repository is private, instead of `hub_private_repo`.
        card: arguments of `create_model_card`.
    """

    message: str = attrs.field(default=END_OF_TRAINING, converter=_message)
    blocking: bool = True
    token: str | None = attrs.field(default=None, repr=False)
    revision: str | None = None
    private: bool | None = None
    card: dict[str, Any] = attrs.field(factory=dict)


def repository_of(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> Repository:
    """The repository that the arguments name: `hub_model_id`, or the name of `output_dir`.

    Args:
        args: the arguments.
        token: instead of `hub_token`.
        private: instead of `hub_private_repo`.
    """
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    private = args.hub_private_repo if private is None else private
    return Repository(name, token or args.hub_token, private, args.hub_revision)


def model_name_of(args: TrainingArguments) -> str:
    """The name of the model for its card: the repository's, without its owner."""
    return (args.hub_model_id or Path(str(args.output_dir)).absolute().name).rpartition("/")[2]
