"""Asynchronous uploads, one at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

import attrs

from fts.errors import HubError
from fts.trainer.hub.repository import Repository
from fts.trainer.hub.snapshots import Snapshot

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

WAIT_MESSAGE_INTERVAL = 30.0
"""Seconds between two messages about an upload that the program waits for."""


@attrs.frozen(eq=False)
class Upload:
    """A snapshot for a repository.

    Attributes:
        repository: gets it.
        snapshot: is deleted after the upload, also if that failed.
        message: of the commit.
    """

    repository: Repository
    snapshot: Snapshot
    message: str

    def send(self) -> CommitInfo:
        """Commit the snapshot; returns what the Hub reports of the commit."""
        return self.repository.upload(self.snapshot.folder, self.message, self.snapshot.replaced)

    def __str__(self) -> str:
        return f"{self.message!r} to {self.repository.id or self.repository.name} ({self.snapshot.size / 2**20:.1f} MiB)"


@attrs.define(eq=False)
class UploadQueue:
    """Uploads one after the other, each on a daemon thread.

    A program that ends does not wait for them. One request at the end of an upload makes the commit, so the repository is
    either unchanged or complete.

    >>> UploadQueue().busy
    False
    """

    _last: Future[CommitInfo] | None = None
    _description: str = ""

    @property
    def busy(self) -> bool:
        """Whether an upload is running or waiting."""
        return self._last is not None and not self._last.done()

    def submit(self, upload: Upload, *, warn: bool = True) -> Future[CommitInfo]:
        """Upload when the previous uploads are done.

        Args:
            upload: what to upload.
            warn: log a warning with the reason if it fails.

        Returns:
            A future of the commit.
        """
        previous = self._last
        future: Future[CommitInfo] = Future()
        self._last, self._description = future, str(upload)
        threading.Thread(target=_run, args=(previous, upload, future, warn), name="fts-upload", daemon=True).start()
        return future

    def wait_until_done(self, report: Callable[[str], object]) -> None:
        """Wait until all uploads have ended, also those that fail.

        Args:
            report: is called with a message about the upload, at once and then every `WAIT_MESSAGE_INTERVAL` seconds.
        """
        start, last = time.perf_counter(), self._last
        if last is None:
            return
        if not last.done():
            report(f"Uploading {self._description} …")
        while not wait([last], WAIT_MESSAGE_INTERVAL).done:
            report(f"Still uploading {self._description}: {time.perf_counter() - start:.0f} s.")

    def warn_if_busy(self) -> None:
        """Warn that a run that was stopped does not wait for its upload, if one is running."""
        if self.busy:
            logger.warning(
                "The run was stopped and does not wait for the upload of %s. All files are on disk.", self._description
            )


def _run(previous: Future[CommitInfo] | None, upload: Upload, future: Future[CommitInfo], warn: bool) -> None:
    if previous is not None:
        wait([previous])
    if not future.set_running_or_notify_cancel():  # the caller may have cancelled the future
        upload.snapshot.delete()
        return
    try:
        commit = upload.send()
    except BaseException as error:  # noqa: BLE001  # the future reports it
        if warn and upload.snapshot.folder.exists():  # else the program is ending
            _warn(error)
        upload.snapshot.delete()
        future.set_exception(error)
    else:
        logger.info("Uploaded %s: %s", upload.message, commit.commit_url)
        upload.snapshot.delete()
        future.set_result(commit)


def _warn(error: BaseException) -> None:
    text = str(error) if isinstance(error, HubError) else f"{type(error).__name__}: {error}"
    logger.warning("An upload failed; the run continues: %s", text)
