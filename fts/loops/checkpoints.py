"""Checkpoints: written atomically, verified by checksums, and never unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import optree

from fts.distributed.error_propagation import fail_together
from fts.distributed.process_group import SINGLE_PROCESS, Group
from fts.dtensors import any_dtensor
from fts.errors import ArgumentError, CheckpointError
from fts.loops.position import Position
from fts.state import OPTIMIZER_NAME, STATE_NAME, TRAINABLE_NAME, WEIGHTS_NAME, TrainState
from fts.storage import (
    MAX_SHARD_SIZE,
    DirectoryContents,
    FileChecksum,
    get_int,
    has_tensors,
    list_files,
    read_json,
    write_contents,
)
from fts.storage.atomic import atomic_directory, recover_interrupted
from fts.storage.manifest import verify_files

PROGRESS_NAME = "progress.json"

FORMAT = 1
"""Version of that file."""

State = TypeVar("State")


def save_checkpoint(
    directory: str | Path,
    state: Any,
    position: Position = Position(),
    *,
    extra: Mapping[str, Any] | None = None,
    write: Callable[[Path], None] | None = None,
    frozen: bool = True,
    shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Write a checkpoint atomically: at any instant it is either complete at `directory`, or does not exist.

    The files are written to a hidden directory next to it, flushed to the disk, listed with size and checksum in
    `manifest.json`, and the directory is renamed. An earlier checkpoint of the same name is moved aside first and
    deleted last; if the run dies between the two renames, the next load moves it back.

    Args:
        directory: of the checkpoint, by convention `.../checkpoint-<step>`; parents are created.
        state: a `TrainState`, or an object with a `save(directory)` that writes the same files.
        position: where in the data to resume.
        extra: other data to save; anything that JSON can represent.
        write: called with the hidden directory before the manifest is written, to add files such as `config.json`.
        frozen: also save the parameters that are not trained; see `TrainState.save`.
        shard_size: at most so many bytes of tensors in a file; see `TrainState.save`.

    Returns:
        The directory.

    Raises:
        ArgumentError: the state cannot be saved, or `extra` cannot be written as JSON.
        CheckpointError: the disk is full or not writable. Earlier checkpoints are kept, also one of the same name.

    >>> import tempfile, torch, fts
    >>> from fts import transforms as tx
    >>> state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as root:
    ...     path = save_checkpoint(f"{root}/checkpoint-0", state, Position(epoch=1))
    ...     state, position = load_checkpoint(path, like=state)
    >>> position
    Position(epoch=1, batch=0)
    """
    job = prepare_save(state, position, extra, write, frozen=frozen, shard_size=shard_size)

    def fill(hidden: Path) -> Mapping[str, FileChecksum]:
        job.write_files(hidden)
        return write_contents(hidden, job.contents())

    return atomic_directory(directory, fill)


@attrs.frozen
class SaveJob:
    """The parts of a save.

    Attributes:
        write_files: writes the files to a directory, except those of a `TrainState`.
        contents: those of a `TrainState`, not copied yet.
        is_sharded: whether tensors of the state are sharded, so that all processes take part.
        write_shards: writes this process's local shards to a directory, given torch's process group; returns their checksums.
    """

    write_files: Callable[[Path], None]
    contents: Callable[[], DirectoryContents] = DirectoryContents
    is_sharded: bool = False
    write_shards: Callable[[Path, Any], Mapping[str, FileChecksum]] | None = None


def prepare_save(
    state: Any,
    position: Position,
    extra: Mapping[str, Any] | None,
    write: Callable[[Path], object] | None,
    *,
    frozen: bool,
    shard_size: int,
) -> SaveJob:
    """The parts of a save of a checkpoint.

    Args:
        state: see `save_checkpoint`, as for all others.
        position: where in the data to resume.
        extra: other data to save.
        write: adds files.
        frozen: also save the parameters that are not trained.
        shard_size: at most so many bytes of tensors in a file.

    Raises:
        ArgumentError: the state cannot be saved, or `extra` cannot be written as JSON.
    """
    if not callable(getattr(state, "save", None)):
        raise ArgumentError(
            f"save_checkpoint was given a state of type {type(state).__name__}, which has no `save`. Give a TrainState, or call "
            "save_checkpoint for each of several states with a directory of its own."
        )
    progress = _progress(position, extra)
    options: dict[str, Any] = {"frozen": frozen, "shard_size": shard_size}

    def write_files(directory: Path) -> None:
        if write is not None:
            write(directory)  # first, so that its files cannot replace those of the state
        (directory / PROGRESS_NAME).write_text(progress, encoding="utf-8")
        if not isinstance(state, TrainState):
            _save_custom_state(state, directory, **options)

    if not isinstance(state, TrainState):
        return SaveJob(write_files)
    return SaveJob(
        write_files,
        lambda: state.checkpoint_contents(**options),
        any_dtensor(optree.tree_leaves((state.params, state.frozen, state.buffers, state.opt_state))),  # type: ignore[arg-type]
        lambda directory, process_group: state.save_sharded(directory, **options, process_group=process_group),
    )


def _save_custom_state(state: Any, directory: Path, *, frozen: bool, shard_size: int) -> None:
    """Call `save` of a state that is not a `TrainState`, with the options that differ from the defaults."""
    options: dict[str, Any] = {} if frozen else {"frozen": frozen}
    if shard_size != MAX_SHARD_SIZE:
        options["shard_size"] = shard_size
    state.save(directory, **options)
    try:
        _required_files(directory)
    except CheckpointError as error:
        raise ArgumentError(
            f"{type(state).__name__}.save did not write the files that a checkpoint is loaded from: {error}"
        ) from error


def _required_files(directory: Path) -> list[str]:
    """The files that loading needs: a manifest must list them."""
    weights = [name for name in (WEIGHTS_NAME, TRAINABLE_NAME) if has_tensors(directory, name)]
    names = [*(weights or [WEIGHTS_NAME]), OPTIMIZER_NAME, STATE_NAME, PROGRESS_NAME]
    return [file for name in names for file in list_files(directory, name)]


def load_checkpoint(directory: str | Path, like: State, *, group: Group = SINGLE_PROCESS) -> tuple[State, Position]:
    """Read a checkpoint of `save_checkpoint` or an `AsyncCheckpointer`, after verifying every file.

    It may have been written by another number of processes, and with the state sharded in another way.

    Args:
        directory: a checkpoint.
        like: a state of the same model and transform, for instance a freshly created one. Of a sharded tensor each process
            reads its local shard.
        group: processes that all load the same directory at this time: each verifies some of the files.

    Returns:
        The state, and the position in the data to resume at.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or the state does not fit `like`.
    """
    directory = Path(directory)
    with fail_together(group):
        recover_interrupted(directory)
        _verify(directory, (group.rank, group.size))
    document = read_json(directory, PROGRESS_NAME, version=FORMAT)
    position = Position(*(get_int(directory / PROGRESS_NAME, document, key) for key in ("epoch", "batch")))
    load: Callable[..., State] = type(like).load  # type: ignore[attr-defined]
    return load(directory, like=like), position


def load_extra(directory: str | Path) -> dict[str, Any]:
    """The `extra` that a checkpoint was saved with.

    Args:
        directory: a checkpoint; its files are not verified.

    Returns:
        The dictionary; empty if there was none.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    extra = read_json(Path(directory), PROGRESS_NAME, version=FORMAT).get("extra", {})
    if not isinstance(extra, dict):
        raise CheckpointError(f'{Path(directory) / PROGRESS_NAME} has "extra" of type {type(extra).__name__}, not an object.')
    return extra


def verify_checkpoint(directory: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        directory: a checkpoint. Files that are not in the manifest are ignored, and never read.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt; the message names it.
    """
    _verify(Path(directory))


def _verify(directory: Path, share: tuple[int, int] = (0, 1)) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"There is no checkpoint at {directory}.")
    verify_files(directory, lambda: _required_files(directory), shard=share)


def _progress(position: Position, extra: Mapping[str, Any] | None) -> str:
    document = {"format": FORMAT, "epoch": position.epoch, "batch": position.batch, "extra": dict(extra or {})}
    try:
        return json.dumps(document, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"save_checkpoint(extra=...) must be JSON-serializable: {error}.") from error
