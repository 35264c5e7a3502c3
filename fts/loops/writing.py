"""Checkpoints that are written beside training, from a copy of the state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from fts.errors import CheckpointError, Interrupted
from fts.loops.checkpoints import filling
from fts.loops.events import Event, StepEnd, Stopped
from fts.loops.position import Position
from fts.storage import SHARD_SIZE, Contents, Image, Written, write as write_contents, write_image, write_texts
from fts.storage.whole import abandoned_on_error, begun, complete

logger = logging.getLogger(__name__)

Fill = Callable[[Path], object]
Rest = Callable[[], Mapping[str, Written]]
"""Writes what is left to write to the hidden directory, and tells what it knows of it."""


@attrs.define(eq=False)
class Writer:
    """Writes checkpoints as `save_checkpoint` does, but off the training thread.

    `save` copies the state and returns; a thread writes the copy, flushes it and renames the directory. One save at most is under
    way: the next waits for it. What goes wrong behind is raised by the next `poll`, `wait` or `save`. Until a save is done, its
    directory is hidden, so a run that dies leaves the checkpoint before. A program that ends, also by an exception, first lets
    the thread finish.

    The copy takes the memory of the state once more, for as long as the writer is open: it is kept, since copying into memory
    that was used before is eight times as fast. States that are no `TrainState` are written before `save` returns; only the
    checksums, the flush and the renaming are left to the thread.

    As a context it waits at its end for the last save, except where `Interrupted` leaves it: that is in haste.

    Args:
        background: False writes everything before `save` returns, without a copy.

    >>> import tempfile, torch, fts
    >>> from fts import loops, transforms as tx
    >>> state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as root, Writer() as writer:
    ...     path = writer.save(f"{root}/checkpoint-0", state, Position(epoch=1))
    ...     writer.wait()
    ...     loops.load_checkpoint(path, like=state)[1]
    Position(epoch=1, batch=0)
    """

    background: bool = True
    _image: Image = attrs.field(factory=Image, init=False, repr=False)
    _thread: threading.Thread | None = attrs.field(default=None, init=False, repr=False)
    _error: BaseException | None = attrs.field(default=None, init=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Memory of the copy, in bytes."""
        return self._image.nbytes

    def save(
        self,
        directory: str | Path,
        state: Any,
        position: Position = Position(),
        *,
        extra: Mapping[str, Any] | None = None,
        write: Fill | None = None,
        then: Callable[[], object] | None = None,
        frozen: bool = True,
        shard_size: int = SHARD_SIZE,
    ) -> Path:
        """Begin to write a checkpoint; the state may be overwritten as soon as this returns.

        Args:
            directory: see `save_checkpoint`; so are `state`, `position`, `extra`, `frozen` and `shard_size`.
            state: is copied.
            position: where in the data to resume.
            extra: what else to keep.
            write: called with the hidden directory before this returns, to add files such as `config.json`.
            then: called when the checkpoint is durable, on the thread that writes: to delete older ones, for instance.
            frozen: also keep the parameters that are not trained.
            shard_size: bytes of tensors that a file may have.

        Returns:
            The directory. It is there when the save is done.

        Raises:
            ArgumentError: the state cannot be saved, or `extra` cannot be written as JSON.
            CheckpointError: the disk is full or not writable, or the save before met an error.
        """
        begin = filling(state, position, extra, write, frozen=frozen, shard_size=shard_size)
        return self._run(Path(directory), begin, then)

    def write(self, directory: str | Path, write: Fill, then: Callable[[], object] | None = None) -> Path:
        """Begin to write a directory without a state, as `write_whole` does.

        Args:
            directory: where it shall be.
            write: called with the hidden directory, before this returns.
            then: see `save`.

        Returns:
            The directory. It is there when the thread has made it durable.

        Raises:
            CheckpointError: as for `save`.
        """

        def begin(hidden: Path) -> Contents:
            write(hidden)
            return Contents()

        return self._run(Path(directory), begin, then)

    def poll(self) -> None:
        """Raise what the thread met, once.

        Raises:
            CheckpointError: the last save, or what was to follow it, failed.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until what is being written is durable, and raise what `poll` raises."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def close(self) -> None:
        """Wait, and give the memory of the copy back."""
        try:
            self.wait()
        finally:
            self._image = Image()

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, but an error of the thread is raised after the step during which it came.

        The last event, `Stopped`, comes when the last save is durable.

        Args:
            events: those of `fit`.
        """
        for event in events:
            if isinstance(event, Stopped):
                self.wait()
            yield event
            if isinstance(event, StepEnd):
                self.poll()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif not isinstance(error, Interrupted):
            try:
                self.close()
            except Exception as other:  # noqa: BLE001  # the one under way is the cause of more
                error.add_note(f"Besides, the last checkpoint failed: {other}")

    def _rest_of(self, hidden: Path, contents: Contents) -> Rest:
        if not self.background:
            return lambda: write_contents(hidden, contents)
        write_texts(hidden, contents)
        before = self.nbytes
        try:
            images = self._image.hold(contents.files)
        except MemoryError as error:
            self._image, self.background = Image(), False
            logger.warning(
                "There is no memory for a copy of the state (%s): from here on, checkpoints are written before training goes on, "
                "as with Writer(background=False), which is async_save=False of the Trainer.",
                error,
            )
            return lambda: write_contents(hidden, contents)
        if self.nbytes != before:
            size = self.nbytes / 2**20
            logger.info("Checkpoints are written beside training from a copy of the state: %.0f MiB.", size)
        sizes = {file.name: file.size for file in contents.files}
        return lambda: {
            name: write_image(hidden / name, image, size) for (name, size), image in zip(sizes.items(), images, strict=True)
        }

    def _run(self, directory: Path, begin: Callable[[Path], Contents], then: Callable[[], object] | None) -> Path:
        self.wait()
        with begun(directory) as hidden:
            rest = self._rest_of(hidden, begin(hidden))
        if self.background:
            # no daemon: the interpreter lets it finish before it exits
            self._thread = threading.Thread(target=self._finish, args=(directory, hidden, rest, then), name="fts-checkpoint")
            self._thread.start()
        else:
            _finish(directory, hidden, rest, then)
        return directory

    def _finish(self, *job: Any) -> None:
        try:
            _finish(*job)
        except BaseException as error:  # noqa: BLE001  # raised where the program waits or polls
            self._error = error


def _finish(directory: Path, hidden: Path, rest: Rest, then: Callable[[], object] | None) -> None:
    with abandoned_on_error(directory, hidden):
        complete(directory, hidden, rest())
    if then is None:
        return
    try:
        then()
    except Exception as error:
        raise CheckpointError(f"{directory} is complete, but what was to follow its save failed: {error}") from error
