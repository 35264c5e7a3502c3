"""Checkpoints that are written asynchronously, from a copy of the state."""

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
from fts.distributed.process_group import SINGLE_PROCESS, Group
from fts.errors import ArgumentError, CheckpointError, Interrupted
from fts.loops.checkpoints import SaveJob, prepare_save
from fts.loops.events import Event, StepEnd, Stopped
from fts.loops.position import Position
from fts.storage import MAX_SHARD_SIZE, FileChecksum, StagingBuffer, join_gather, write_contents, write_direct, write_text_files
from fts.storage.atomic import commit, remove_on_error, temporary_directory, translate_disk_errors

logger = logging.getLogger(__name__)

WriteFiles = Callable[[Path], object]
Finalize = Callable[[], Mapping[str, FileChecksum]]
"""Writes the remaining files to the temporary directory; returns the checksums that are known."""


@attrs.define(eq=False)
class AsyncCheckpointer:
    """Writes checkpoints as `save_checkpoint` does, but asynchronously.

    `save` copies the state and returns; a thread writes the copy, flushes it and renames the directory. At most one save is in
    progress: the next waits for it. An error of the thread is raised by the next `poll`, `wait` or `save`. Until a save is done,
    its directory is hidden, so a run that dies leaves the checkpoint before. A program that ends, also by an exception, first
    lets the thread finish.

    The copy takes the memory of the state once more, for as long as the checkpointer is open: it is kept, since copying into
    memory that was used before is eight times as fast. A state that is not a `TrainState` is written before `save` returns; only
    the checksums, the flush and the renaming are left to the thread.

    As a context it waits at its end for the last save, unless `Interrupted` is raised: then the process should end at once.

    In several processes, each has a checkpointer and all call `save` at the same time, but only the first one writes. An error in
    one is raised in all: one while a save begins at once, one of the thread at the next save and at the end of `watch`; until
    then `has_failed` is True. Where the state is sharded (FSDP2), "full" gathers one tensor after the other to the first process,
    and the files are those of a single process; "sharded" lets each write its local shards into the same directory, by
    `torch.distributed.checkpoint`, and all wait until it is complete. `loops.load_checkpoint` reads both, in any number of
    processes.

    Args:
        background: False writes everything before `save` returns, without a copy.
        group: the processes.
        each_node: the first process of each machine writes, to a disk of its own.
        state_dict: "full" or "sharded".

    Raises:
        ArgumentError: `each_node` with sharded checkpoints, which need a shared file system.

    >>> import tempfile, torch, fts
    >>> from fts import loops, transforms as tx
    >>> state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as root, AsyncCheckpointer() as checkpointer:
    ...     path = checkpointer.save(f"{root}/checkpoint-0", state, Position(epoch=1))
    ...     checkpointer.wait()
    ...     loops.load_checkpoint(path, like=state)[1]
    Position(epoch=1, batch=0)
    """

    background: bool = True
    group: Group = attrs.field(default=SINGLE_PROCESS, kw_only=True)
    each_node: bool = attrs.field(default=False, kw_only=True)
    state_dict: Literal["full", "sharded"] = attrs.field(default="full", kw_only=True)
    _staging: StagingBuffer = attrs.field(factory=StagingBuffer, init=False, repr=False)
    _thread: threading.Thread | None = attrs.field(default=None, init=False, repr=False)
    _error: BaseException | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.state_dict == "sharded" and self.each_node:
            raise ArgumentError(
                "A sharded checkpoint is one directory on a file system that all processes share, so each_node=True "
                "(save_on_each_node of the Trainer) is not possible. Leave it out, or write full checkpoints."
            )

    @property
    def nbytes(self) -> int:
        """Memory of the copy, in bytes."""
        return self._staging.nbytes

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the files that are not sharded."""
        return self.group.is_main_process or (self.each_node and self.group.local_rank == 0)

    @property
    def has_failed(self) -> bool:
        """Whether the thread had an error that was not raised yet."""
        return self._error is not None

    def save(
        self,
        directory: str | Path,
        state: Any,
        position: Position = Position(),
        *,
        extra: Mapping[str, Any] | None = None,
        write: WriteFiles | None = None,
        on_complete: Callable[[], object] | None = None,
        frozen: bool = True,
        shard_size: int = MAX_SHARD_SIZE,
    ) -> Path:
        """Begin to write a checkpoint; the state may be overwritten as soon as this returns.

        Args:
            directory: see `save_checkpoint`; so are `state`, `position`, `extra`, `frozen` and `shard_size`.
            state: is copied.
            position: where in the data to resume.
            extra: other data to save.
            write: called with the temporary directory before this returns, to add files such as `config.json`. All processes
                call it, with the directory of the first: gather data of all in it, and write where `is_writer` is True.
            on_complete: called on the writing thread when the checkpoint is durable: to delete older ones, for instance.
            frozen: also save the parameters that are not trained.
            shard_size: at most so many bytes of tensors in a file.

        Returns:
            The directory. It exists when the save is done.

        Raises:
            ArgumentError: the state cannot be saved, or `extra` cannot be written as JSON.
            CheckpointError: the disk is full or not writable, or the save before failed.
        """
        job = prepare_save(state, position, extra, None, frozen=frozen, shard_size=shard_size)
        return self._run(Path(directory), job, write, on_complete)

    def write_directory(self, directory: str | Path, write: WriteFiles, on_complete: Callable[[], object] | None = None) -> Path:
        """Begin to write a directory without a state, as `atomic_directory` does.

        Args:
            directory: its path.
            write: see `save`.
            on_complete: called when it is durable.

        Returns:
            The directory. It exists when the save is done.

        Raises:
            CheckpointError: as for `save`.
        """
        return self._run(Path(directory), SaveJob(lambda hidden: None), write, on_complete)

    def poll(self) -> None:
        """Raise the error of the thread, once.

        Raises:
            CheckpointError: the last save, or its `on_complete`, failed.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait until the save in progress is durable, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """`join`, then `poll`."""
        self.join()
        self.poll()

    def close(self) -> None:
        """`wait`, and free the memory of the copy."""
        try:
            self.wait()
        finally:
            self._staging = StagingBuffer()

    def watch(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, but an error of the thread is raised after the step during which it happened.

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
            except Exception as other:  # noqa: BLE001  # the first error is the one to raise
                error.add_note(f"Besides, the last checkpoint failed: {other}")

    def _run(self, directory: Path, job: SaveJob, write: WriteFiles | None, on_complete: Callable[[], object] | None) -> Path:
        with ExitStack() as stack:
            with fail_together(self.group), translate_disk_errors(directory):
                self.wait()
                hidden = stack.enter_context(temporary_directory(directory)) if self.is_writer else None
            if write is not None:  # first, so that its files cannot replace those of the state
                there = self.group.broadcast_object(hidden)
                with fail_together(self.group), translate_disk_errors(directory):
                    write(there if hidden is None else hidden)
            with fail_together(self.group), translate_disk_errors(directory):
                if hidden is not None:
                    job.write_files(hidden)
            writes_shards = self.state_dict == "sharded" and job.is_sharded
            finalize = (self._write_shards if writes_shards else self._write_full)(directory, hidden, job)
        if hidden is not None:
            arguments = (directory, hidden, finalize, on_complete)
            if self.background:
                # no daemon: the interpreter waits for it before it exits
                self._thread = threading.Thread(target=self._finish, args=arguments, name="fts-checkpoint")
                self._thread.start()
            else:
                self._finish(*arguments)
        with fail_together(self.group):
            if self._thread is None:
                self.poll()
        return directory

    def _write_shards(self, directory: Path, hidden: Path | None, job: SaveJob) -> Finalize:
        assert job.write_shards is not None
        there: Path = self.group.broadcast_object(hidden)
        with fail_together(self.group), translate_disk_errors(directory):
            written = job.write_shards(there, self.group.process_group)
        of_all = {name: checksum for one in self.group.all_gather_object(dict(written)) for name, checksum in one.items()}
        return lambda: of_all

    def _write_full(self, directory: Path, hidden: Path | None, job: SaveJob) -> Finalize:
        with fail_together(self.group), translate_disk_errors(directory):
            if hidden is not None:
                return self._stage(hidden, job)
            if job.is_sharded:
                join_gather(job.contents())
        return dict

    def _stage(self, hidden: Path, job: SaveJob) -> Finalize:
        contents = job.contents()
        if not self.background:
            written = write_contents(hidden, contents)
            return lambda: written
        before = self.nbytes
        try:
            buffers = self._staging.copy_from(contents.files)
        except MemoryError as error:
            self._staging, self.background = StagingBuffer(), False
            logger.warning(
                "There is no memory for a copy of the state (%s): from now on, training waits until checkpoints are written, as "
                "with AsyncCheckpointer(background=False), which is async_save=False of the Trainer.",
                error,
            )
            written = write_contents(hidden, contents)
            return lambda: written
        write_text_files(hidden, contents)  # not before: an error above must not leave other processes waiting
        if self.nbytes != before:
            size = self.nbytes / 2**20
            logger.info("Checkpoints are written asynchronously from a copy of the state: %.0f MiB.", size)
        sizes = {file.name: file.size for file in contents.files}
        return lambda: {
            name: write_direct(hidden / name, buffer, size) for (name, size), buffer in zip(sizes.items(), buffers, strict=True)
        }

    def _finish(self, *arguments: Any) -> None:
        try:
            _finish(*arguments)
        except BaseException as error:  # noqa: BLE001  # raised where the program waits or polls
            self._error = error


def _finish(directory: Path, hidden: Path, finalize: Finalize, on_complete: Callable[[], object] | None) -> None:
    with remove_on_error(directory, hidden):
        commit(directory, hidden, finalize())
    if on_complete is None:
        return
    try:
        on_complete()
    except Exception as error:
        raise CheckpointError(f"{directory} is complete, but the callback after its save failed: {error}") from error
