"""Uploads that run beside training, one at a time."""

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

EVERY = 30.0
"""Seconds between two lines that say what is waited for."""


@attrs.frozen(eq=False)
class Upload:
    """A snapshot for a repository.

    Attributes:
        repository: gets it.
        snapshot: is dropped when it is uploaded, or given up.
        message: of the commit.
    """

    repository: Repository
    snapshot: Snapshot
    message: str

    def send(self) -> CommitInfo:
        """Commit the snapshot; returns what the Hub tells of the commit."""
        return self.repository.upload(self.snapshot.folder, self.message, self.snapshot.replaced)

    def __str__(self) -> str:
        return f"{self.message!r} to {self.repository.id or self.repository.name} ({self.snapshot.size / 2**20:.1f} MiB)"


@attrs.define(eq=False)
class Uploads:
    """Uploads one after the other, each on a thread that ends with the program.

    A program that ends does not wait for them: a commit is made by one request at the end of an upload, so that the repository
    is as before or as after.

    >>> Uploads().busy
    False
    """

    _last: Future[CommitInfo] | None = None
    _what: str = ""

    @property
    def busy(self) -> bool:
        """Whether one is running or waits."""
        return self._last is not None and not self._last.done()

    def begin(self, upload: Upload, *, warn: bool = True) -> Future[CommitInfo]:
        """Upload when those before are done.

        Args:
            upload: what.
            warn: where it fails, log a warning with the reason.

        Returns:
            The commit, once it is made.
        """
        before = self._last
        future: Future[CommitInfo] = Future()
        self._last, self._what = future, str(upload)
        threading.Thread(target=_run, args=(before, upload, future, warn), name="fts-upload", daemon=True).start()
        return future

    def wait(self, say: Callable[[str], object]) -> None:
        """Wait until all are done, however they end.

        Args:
            say: is told what is waited for, at once and then from time to time.
        """
        start, last = time.perf_counter(), self._last
        if last is None:
            return
        if not last.done():
            say(f"Uploading {self._what} …")
        while not wait([last], EVERY).done:
            say(f"Still uploading {self._what}: {time.perf_counter() - start:.0f} s.")

    def leave(self) -> None:
        """Say so where a run ends in haste while one is running: it goes on, but the program does not wait for it."""
        if self.busy:
            logger.warning(
                "The upload of %s is not waited for, because the run was stopped. All files are on the disk.", self._what
            )


def _run(before: Future[CommitInfo] | None, upload: Upload, future: Future[CommitInfo], warn: bool) -> None:
    if before is not None:
        wait([before])
    if not future.set_running_or_notify_cancel():  # whoever has the future may cancel it
        upload.snapshot.drop()
        return
    try:
        found = upload.send()
    except BaseException as error:  # noqa: BLE001  # whoever waits for it gets it
        if warn and upload.snapshot.folder.exists():  # else the program is ending
            _warn(error)
        upload.snapshot.drop()
        future.set_exception(error)
    else:
        logger.info("Uploaded %s: %s", upload.message, found.commit_url)
        upload.snapshot.drop()
        future.set_result(found)


def _warn(error: BaseException) -> None:
    text = str(error) if isinstance(error, HubError) else f"{type(error).__name__}: {error}"
    logger.warning("An upload failed, which stops nothing: %s", text)
