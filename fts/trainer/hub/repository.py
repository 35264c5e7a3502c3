"""A repository on the Hub, and commits to it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from fts.errors import HubError
from fts.trainer.hub.errors import REFUSED_STATUSES, describe_error, is_refusal, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

READ_TIMEOUT = 120.0
"""Seconds until a connection without an answer fails. huggingface_hub's own client waits for ever."""

LOGIN_HINT = (
    "Log in with `hf auth login`, set HF_TOKEN, or set hub_token; create a token with write access at hf.co/settings/tokens."
)


@attrs.define(eq=False)
class Repository:
    """A repository that a run is uploaded to; it is created when it is first needed.

    Attributes:
        name: as requested; without an owner it belongs to the token's user.
        token: to upload with; None for that of the login.
        private: whether a new one is private; None for its owner's default.
        revision: the branch; None for main.
        id: the full name, once the Hub has returned it.
    """

    name: str
    token: str | None = attrs.field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    id: str | None = None

    def open(self) -> str:
        """Create the repository and the branch unless they exist, and check that the token has write access.

        Returns:
            The full name.

        Raises:
            HubError: they cannot be created or written to.
        """
        try:
            self.id = self._create()
        except Exception as error:  # noqa: BLE001  # of any layer of huggingface_hub
            raise self._hub_error("cannot be written to", error) from self._safe_cause(error)
        return self.id

    def upload(self, folder: Path, message: str, replaced: Sequence[str] = ()) -> CommitInfo:
        """Commit a folder: its files are added or replaced, others stay.

        Args:
            folder: has the files.
            message: of the commit.
            replaced: folders of the repository whose other files are deleted.

        Raises:
            HubError: the upload failed.
        """
        if self.id is None:
            self.open()
        patterns = [f"{name}/*" for name in replaced]
        try:
            with hidden_progress_bars(), read_timeout():
                return _api().upload_folder(
                    repo_id=str(self.id),
                    folder_path=folder,
                    commit_message=message,
                    token=self.token,
                    revision=self.revision,
                    delete_patterns=patterns or None,
                )
        except Exception as error:  # noqa: BLE001  # of any layer of huggingface_hub
            raise self._hub_error(f"did not accept {message!r}", error) from self._safe_cause(error)

    def _create(self) -> str:
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            text = f"hub_revision={self.revision!r} is a commit, but an upload creates one. Give a branch."
            raise HubError(text, refused=True)
        api = _api()
        with read_timeout():
            self._check_token()
            repo_id = str(api.create_repo(self.name, token=self.token, private=self.private, exist_ok=True).repo_id)
            self._check_writable(api, repo_id)
            if self.revision not in (None, "main") and not str(self.revision).startswith("refs/"):
                api.create_branch(repo_id, branch=str(self.revision), token=self.token, exist_ok=True)
        return repo_id

    def _check_token(self) -> None:
        from huggingface_hub import get_token
        from huggingface_hub.errors import LocalTokenNotFoundError

        if self.token is None and get_token() is None:
            raise LocalTokenNotFoundError("no token was found")

    def _check_writable(self, api: Any, repo_id: str) -> None:
        if "write" not in inspect.signature(api.auth_check).parameters:  # an older huggingface_hub
            return
        try:
            api.auth_check(repo_id, token=self.token, write=True)
        except Exception as error:
            if status_of(error) in REFUSED_STATUSES:
                raise

    def _hub_error(self, problem: str, error: BaseException) -> HubError:
        """The error that says why this repository could not be used."""
        if isinstance(error, HubError):
            return error
        where = f"{self.id or self.name} on the Hub"
        refused = is_refusal(error)
        if type(error).__name__ == "OfflineModeIsEnabled":
            remedy = "Unset HF_HUB_OFFLINE, or leave push_to_hub out."
        elif status_of(error) in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
            source = "the token of the login" if self.token is None else "hub_token"
            remedy = f"The attempt used {source}. {LOGIN_HINT}"
        elif refused:
            remedy = "See hub_model_id and hub_private_repo."
        else:
            remedy = "All files are on disk."
        return HubError(f"{where} {problem}: {describe_error(error, self.token)}. {remedy}".replace("..", "."), refused=refused)

    def _safe_cause(self, error: BaseException) -> BaseException | None:
        """The error as a cause, unless its text contains the token."""
        return None if self.token and self.token in str(error) else error


def _api() -> Any:
    from huggingface_hub import HfApi  # comes with accelerate

    return HfApi()


@contextmanager
def read_timeout() -> Iterator[None]:
    """A block in which requests time out after `READ_TIMEOUT`, unless the user's own client sets a timeout."""
    from huggingface_hub.utils import get_session

    client: Any = get_session()
    before = getattr(client, "timeout", None)
    bounded = before is not None and getattr(before, "read", 0) is None
    if bounded:
        client.timeout = READ_TIMEOUT
    try:
        yield
    finally:
        if bounded:
            client.timeout = before


@contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """A block in which huggingface_hub shows no progress bars, which would overwrite that of training."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
