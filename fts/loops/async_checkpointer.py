"""Checkpoints that are written beside training, from a copy of the state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import attrs

from fts.distributed.error_propagation import fail_together
from fts.distributed.process_group import ALONE, Group
from fts.errors import ArgumentError, CheckpointError, Interrupted
from fts.loops.checkpoints import Job, filling
from fts.loops.events import Event, StepEnd, Stopped
from fts.loops.position import Position
from fts.storage import SHARD_SIZE, StagingBuffer, Written, take_part, write as write_contents, write_image, write_texts
from fts.storage.atomic import abandoned_on_error, begun, complete, explained

logger = logging.getLogger(__name__)

Fill = Callable[[Path], object]
Rest = Callable[[], Mapping[str, Written]]
"""Writes what is left to write to the hidden directory, and tells what it knows of it."""


@attrs.define(eq=False)
class AsyncCheckpointer:
    """Writes checkpoints as `save_checkpoint` does, but off the training thread.

    `save` copies the state and returns; a thread writes the copy, flushes it and renames the directory. One save at most is under
    way: the next waits for it. What goes wrong behind is raised by the next `poll`, `wait` or `save`. Until a save is done, its
    directory is hidden, so a run that dies leaves the checkpoint before. A program that ends, also by an exception, first lets
    the thread finish.

    The copy takes the memory of the state once more, for as long as the writer is open: it is kept, since copying into memory
    that was used before is eight times as fast. States that are no `TrainState` are written before `save` returns; only the
    checksums, the flush and the renaming are left to the thread.

    As a context it waits at its end for the last save, except where `Interrupted` leaves it: that is in haste.

    Of several processes, each has a writer and calls `save` at the same time, but the first one alone writes. What fails in one
    fails in all: an error while a save begins at once, one of the thread at the next save and at the end of `watch`; until then
    `failed` tells. Where the state is spread over processes (FSDP2), "full" gathers one tensor after the other to the first, and
    the files are those of a process that is alone; "sharded" lets each write its own parts into the same directory, by
    `torch.distributed.checkpoint`, and all wait until it is complete. `loops.load_checkpoint` reads both, in any number of
    processes.

    Args:
        background: False writes everything before `save` returns, without a copy.
        group: the processes.
        each_node: the first process of each machine writes, to a disk of its own.
        state_dict: "full" or "sharded".

    Raises:
        ArgumentError: sharded checkpoints were to be written to disks that are not shared.

    >>> import tempfile, torch, fts
    >>> from fts import loops, transforms as tx
    >>> state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as root, AsyncCheckpointer() as writer:
    ...     path = writer.save(f"{root}/checkpoint-0", state, Position(epoch=1))
    ...     writer.wait()
    ...     loops.load_checkpoint(path, like=state)[1]
    Position(epoch=1, batch=0)
    """

    background: bool = True
    group: Group = attrs.field(default=ALONE, kw_only=True)
    each_node: bool = attrs.field(default=False, kw_only=True)
    state_dict: Literal["full", "sharded"] = attrs.field(default="full", kw_only=True)
    _image: StagingBuffer = attrs.field(factory=StagingBuffer, init=False, repr=False)
    _thread: threading.Thread | None = attrs.field(default=None, init=False, repr=False)
    _error: BaseException | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.state_dict == "sharded" and self.each_node:
            raise ArgumentError(
                "Sharded checkpoints are one directory that all processes write to, in a file system that they share, so "
                "each_node=True (save_on_each_node of the Trainer) cannot be. Leave it out, or write full ones."
            )

    @property
    def nbytes(self) -> int:
        """Memory of the copy, in bytes."""
        return self._image.nbytes

    @property
    def writes(self) -> bool:
        """Whether this process writes what one process writes for all."""
        return self.group.is_first or (self.each_node and self.group.local_rank == 0)

    @property
    def failed(self) -> bool:
        """Whether the thread met an error that was not raised yet."""
        return self._error is not None

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
            write: called with the hidden directory before this returns, to add files such as `config.json`. Of several processes
                each calls it, with the directory of the first: gather there what all have, and write where `writes` says so.
            then: called when the checkpoint is durable, on the thread that writes: to delete older ones, for instance.
            frozen: also keep the parameters that are not trained.
            shard_size: bytes of tensors that a file may have.

        Returns:
            The directory. It is there when the save is done.

        Raises:
            ArgumentError: the state cannot be saved, or `extra` cannot be written as JSON.
            CheckpointError: the disk is full or not writable, or the save before met an error.
        """
        job = filling(state, position, extra, None, frozen=frozen, shard_size=shard_size)
        return self._run(Path(directory), job, write, then)

    def write(self, directory: str | Path, write: Fill, then: Callable[[], object] | None = None) -> Path:
        """Begin to write a directory without a state, as `atomic_directory` does.

        Args:
            directory: where it shall be.
            write: see `save`; so is `then`.
            then: called when it is durable.

        Returns:
            The directory. It is there when the thread has made it durable.

        Raises:
            CheckpointError: as for `save`.
        """
        return self._run(Path(directory), Job(lambda hidden: None), write, then)

    def poll(self) -> None:
        """Raise what the thread met, once.

        Raises:
            CheckpointError: the last save, or what was to follow it, failed.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait until what is being written is durable, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """The same, and raise what `poll` raises."""
        self.join()
        self.poll()

    def close(self) -> None:
        """Wait, and give the memory of the copy back."""
        try:
            self.wait()
        finally:
            self._image = StagingBuffer()

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, but an error of the thread is raised after the step during which it came.

        The last event, `Stopped`, comes when the last save is durable.

        Args:
            events: those of `fit`.
        """
        for event in events:
            if isinstance(event, Stopped):
                with fail_together(self.group):
                    self.wait()
            yield event
            if isinstance(event, StepEnd) and self.group.size == 1:
                self.poll()

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif not isinstance(error, Interrupted):
            try:
                self.close()
            except Exception as other:  # noqa: BLE001  # the one under way is the cause of more
                error.add_note(f"Besides, the last checkpoint failed: {other}")

    def _run(self, directory: Path, job: Job, write: Fill | None, then: Callable[[], object] | None) -> Path:
        with ExitStack() as stack:
            with fail_together(self.group), explained(directory):
                self.wait()
                hidden = stack.enter_context(begun(directory)) if self.writes else None
            if write is not None:  # first, so that nothing it writes stands for the state
                there = self.group.broadcast(hidden)
                with fail_together(self.group), explained(directory):
                    write(there if hidden is None else hidden)
            with fail_together(self.group), explained(directory):
                if hidden is not None:
                    job.fill(hidden)
            in_parts = self.state_dict == "sharded" and job.spread
            rest = (self._rest_in_parts if in_parts else self._rest_of)(directory, hidden, job)
        if hidden is not None:
            arguments = (directory, hidden, rest, then)
            if self.background:
                # no daemon: the interpreter lets it finish before it exits
                self._thread = threading.Thread(target=self._finish, args=arguments, name="fts-checkpoint")
                self._thread.start()
            else:
                self._finish(*arguments)
        with fail_together(self.group):
            if self._thread is None:
                self.poll()
        return directory

    def _rest_in_parts(self, directory: Path, hidden: Path | None, job: Job) -> Rest:
        assert job.parts is not None
        there: Path = self.group.broadcast(hidden)
        with fail_together(self.group), explained(directory):
            written = job.parts(there, self.group.handle)
        of_all = {name: facts for one in self.group.gather(dict(written)) for name, facts in one.items()}
        return lambda: of_all

    def _rest_of(self, directory: Path, hidden: Path | None, job: Job) -> Rest:
        with fail_together(self.group), explained(directory):
            if hidden is not None:
                return self._held(hidden, job)
            if job.spread:
                take_part(job.contents())
        return dict

    def _held(self, hidden: Path, job: Job) -> Rest:
        contents = job.contents()
        if not self.background:
            written = write_contents(hidden, contents)
            return lambda: written
        before = self.nbytes
        try:
            images = self._image.hold(contents.files)
        except MemoryError as error:
            self._image, self.background = StagingBuffer(), False
            logger.warning(
                "There is no memory for a copy of the state (%s): from here on, checkpoints are written before training goes on, "
                "as with Writer(background=False), which is async_save=False of the Trainer.",
                error,
            )
            written = write_contents(hidden, contents)
            return lambda: written
        write_texts(hidden, contents)  # not before: the others wait for nobody who has failed
        if self.nbytes != before:
            size = self.nbytes / 2**20
            logger.info("Checkpoints are written beside training from a copy of the state: %.0f MiB.", size)
        sizes = {file.name: file.size for file in contents.files}
        return lambda: {
            name: write_image(hidden / name, image, size) for (name, size), image in zip(sizes.items(), images, strict=True)
        }

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
