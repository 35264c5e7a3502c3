"""The methods of the Trainer that upload to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fts.trainer.arguments import TrainingArguments
from fts.trainer.callbacks import TrainerState
from fts.trainer.hub.push import init_hf_repo, push_to_hub
from fts.trainer.hub.session import HubSession, PushOptions


class HubMixin:
    """Uploads to the Hugging Face Hub, as Hugging Face's Trainer does."""

    args: TrainingArguments
    state: TrainerState
    hub_session: HubSession
    save_model: Callable[..., None]
    create_model_card: Callable[..., None]
    is_world_process_zero: Callable[[], bool]
    _call_event: Callable[..., None]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository that `hub_model_id` names, unless it exists; see `hub_token` and `hub_private_repo`.

        Raises:
            HubError: it cannot be created or written to.
        """
        init_hf_repo(self.hub_session, self, token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model with its processing class and its card, and upload `output_dir`, without checkpoints, to the Hub.

        Args:
            commit_message: of the commit.
            blocking: wait for the upload.
            token: to upload with, instead of `hub_token`.
            revision: the branch, instead of `hub_revision`.
            private: whether a new repository is private, instead of `hub_private_repo`.
            **kwargs: for `create_model_card`.

        Returns:
            huggingface_hub's CommitInfo, a string with the URL of the commit; its future unless `blocking`.

        Raises:
            HubError: the upload failed; all files are in `output_dir`.
        """
        options = PushOptions(commit_message, blocking, token, revision, private, kwargs)
        return push_to_hub(self.hub_session, self, options)

    @property
    def hub_model_id(self) -> str | None:
        """The repository on the Hub, with its owner; None until the Hub has returned it."""
        return self.hub_session.repo_id
