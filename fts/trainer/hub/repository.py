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
from fts.trainer.hub.errors import REFUSED, is_refusal, reason, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

SILENCE = 120.0
"""Seconds that a connection may be silent. huggingface_hub's own client waits for ever."""

LOGIN = "Log in with `hf auth login`, set HF_TOKEN, or give hub_token; a token that may write is made at hf.co/settings/tokens."


@attrs.define(eq=False)
class Repository:
    """A repository that a run is uploaded to; it is made when it is first needed.

    Attributes:
        name: as it was asked for; without an owner it is of whom the token belongs to.
        token: to upload with; None for the one that is logged in.
        private: whether a new one is private; None as its owner has set.
        revision: the branch; None for main.
        id: the whole name, once the Hub has told it.
    """

    name: str
    token: str | None = attrs.field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    id: str | None = None

    def open(self) -> str:
        """Make the repository and the branch where they are not there, and see that the token may write.

        Returns:
            The whole name.

        Raises:
            HubError: it could not be done.
        """
        try:
            self.id = self._made()
        except Exception as error:  # noqa: BLE001  # of any of the layers below
            raise self.failed("cannot be written to", error) from self.told(error)
        return self.id

    def upload(self, folder: Path, message: str, replaced: Sequence[str] = ()) -> CommitInfo:
        """Commit a folder: its files are added or replaced, others stay.

        Args:
            folder: has the files.
            message: of the commit.
            replaced: folders of the repository that afterwards have the files of `folder` alone.

        Raises:
            HubError: it could not be uploaded.
        """
        if self.id is None:
            self.open()
        patterns = [f"{name}/*" for name in replaced]
        try:
            with quietly(), bounded_silence():
                return _api().upload_folder(
                    repo_id=str(self.id),
                    folder_path=folder,
                    commit_message=message,
                    token=self.token,
                    revision=self.revision,
                    delete_patterns=patterns or None,
                )
        except Exception as error:  # noqa: BLE001  # of any of the layers below
            raise self.failed(f"did not take {message!r}", error) from self.told(error)

    def _made(self) -> str:
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            text = f"hub_revision={self.revision!r} is a commit, and what is uploaded becomes one. Give a branch."
            raise HubError(text, refused=True)
        api = _api()
        with bounded_silence():
            self._check_token()
            made = str(api.create_repo(self.name, token=self.token, private=self.private, exist_ok=True).repo_id)
            self._check_writable(api, made)
            if self.revision not in (None, "main") and not str(self.revision).startswith("refs/"):
                api.create_branch(made, branch=str(self.revision), token=self.token, exist_ok=True)
        return made

    def _check_token(self) -> None:
        from huggingface_hub import get_token
        from huggingface_hub.errors import LocalTokenNotFoundError

        if self.token is None and get_token() is None:
            raise LocalTokenNotFoundError("no token was found")

    def _check_writable(self, api: Any, made: str) -> None:
        if "write" not in inspect.signature(api.auth_check).parameters:  # an older huggingface_hub
            return
        try:
            api.auth_check(made, token=self.token, write=True)
        except Exception as error:
            if status_of(error) in REFUSED:
                raise

    def failed(self, what: str, error: BaseException) -> HubError:
        """The error that tells why this repository could not be used."""
        if isinstance(error, HubError):
            return error
        where = f"{self.id or self.name} on the Hub"
        refused = is_refusal(error)
        if type(error).__name__ == "OfflineModeIsEnabled":
            remedy = "Unset HF_HUB_OFFLINE, or leave push_to_hub out."
        elif status_of(error) in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
            whose = "the token that is logged in" if self.token is None else "hub_token"
            remedy = f"It was tried with {whose}. {LOGIN}"
        elif refused:
            remedy = "See hub_model_id and hub_private_repo."
        else:
            remedy = "All files are on the disk."
        return HubError(f"{where} {what}: {reason(error, self.token)}. {remedy}".replace("..", "."), refused=refused)

    def told(self, error: BaseException) -> BaseException | None:
        """The error as a cause, unless its text has the token."""
        return None if self.token and self.token in str(error) else error


def _api() -> Any:
    from huggingface_hub import HfApi  # comes with accelerate

    return HfApi()


@contextmanager
def bounded_silence() -> Iterator[None]:
    """A block in which a server that does not answer is an error after `SILENCE`, unless the user's own client sets a time."""
    from huggingface_hub.utils import get_session

    client: Any = get_session()
    before = getattr(client, "timeout", None)
    bounded = before is not None and getattr(before, "read", 0) is None
    if bounded:
        client.timeout = SILENCE
    try:
        yield
    finally:
        if bounded:
            client.timeout = before


@contextmanager
def quietly() -> Iterator[None]:
    """A block in which huggingface_hub shows no bars of its own, which would write over those of training."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
