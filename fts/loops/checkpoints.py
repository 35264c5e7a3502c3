"""Checkpoints that are whole or absent, and never unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import optree

from fts.distributed.error_propagation import fail_together
from fts.distributed.process_group import ALONE, Group
from fts.dtensors import any_sharded
from fts.errors import ArgumentError, CheckpointError
from fts.loops.position import Position
from fts.state import OPTIMIZER, STATE, TRAINED, WEIGHTS, TrainState
from fts.storage import SHARD_SIZE, Contents, Written, files_of, has_tensors, read_document, whole_number, write as write_contents
from fts.storage.atomic import atomic_directory, undo_interrupted
from fts.storage.manifest import verify_files

PROGRESS = "progress.json"

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
    shard_size: int = SHARD_SIZE,
) -> Path:
    """Write a checkpoint that is, at any instant, either complete at `directory` or not there.

    The files are written to a hidden directory beside it, flushed to the disk, listed with size and checksum in
    `manifest.json`, and the directory is renamed. An earlier checkpoint of the same name is moved aside first and
    deleted last; if the run dies between the two renames, the next load moves it back.

    Args:
        directory: where the checkpoint shall be, by convention `.../checkpoint-<step>`; parents are made.
        state: a `TrainState`, or what has a `save(directory)` that writes the same files.
        position: where in the data to resume.
        extra: what else to keep; anything that JSON can hold.
        write: called with the hidden directory before it is sealed, to add files such as `config.json`.
        frozen: also keep the parameters that are not trained; see `TrainState.save`.
        shard_size: bytes of tensors that a file may have; see `TrainState.save`.

    Returns:
        The directory.

    Raises:
        ArgumentError: the state cannot be saved, or `extra` cannot be written as JSON.
        CheckpointError: the disk is full or not writable. Earlier checkpoints stay, also one of the same name.

    >>> import tempfile, torch, fts
    >>> from fts import transforms as tx
    >>> state = fts.TrainState.create({"w": torch.ones(2)}, tx.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as root:
    ...     path = save_checkpoint(f"{root}/checkpoint-0", state, Position(epoch=1))
    ...     state, position = load_checkpoint(path, like=state)
    >>> position
    Position(epoch=1, batch=0)
    """
    job = filling(state, position, extra, write, frozen=frozen, shard_size=shard_size)

    def fill(hidden: Path) -> Mapping[str, Written]:
        job.fill(hidden)
        return write_contents(hidden, job.contents())

    return atomic_directory(directory, fill)


@attrs.frozen
class Job:
    """What writes a checkpoint.

    Attributes:
        fill: writes the files to a directory, but for those of a `TrainState`.
        contents: those: laid out, not copied.
        spread: whether tensors of the state are spread over processes, so that all take part.
        parts: writes what this process has of them to a directory, given torch's process group; returns what it wrote.
    """

    fill: Callable[[Path], None]
    contents: Callable[[], Contents] = Contents
    spread: bool = False
    parts: Callable[[Path, Any], Mapping[str, Written]] | None = None


def filling(
    state: Any,
    position: Position,
    extra: Mapping[str, Any] | None,
    write: Callable[[Path], object] | None,
    *,
    frozen: bool,
    shard_size: int,
) -> Job:
    """How a checkpoint is written.

    Args:
        state: see `save_checkpoint`; so are all others.
        position: where in the data to resume.
        extra: what else to keep.
        write: adds files.
        frozen: also keep the parameters that are not trained.
        shard_size: bytes of tensors that a file may have.

    Raises:
        ArgumentError: the state cannot be saved, or `extra` cannot be written as JSON.
    """
    if not callable(getattr(state, "save", None)):
        raise ArgumentError(
            f"save_checkpoint was given a state of type {type(state).__name__}, which has no `save`. Give a TrainState, or call "
            "save_checkpoint for each of several in directories of their own."
        )
    progress = _progress(position, extra)
    options: dict[str, Any] = {"frozen": frozen, "shard_size": shard_size}

    def fill(directory: Path) -> None:
        if write is not None:
            write(directory)  # first, so that nothing it writes stands for the state
        (directory / PROGRESS).write_text(progress, encoding="utf-8")
        if not isinstance(state, TrainState):
            _save_foreign(state, directory, **options)

    if not isinstance(state, TrainState):
        return Job(fill)
    return Job(
        fill,
        lambda: state.contents(**options),
        any_sharded(optree.tree_leaves((state.params, state.frozen, state.buffers, state.opt_state))),  # type: ignore[arg-type]
        lambda directory, handle: state.save_parts(directory, **options, handle=handle),
    )


def _save_foreign(state: Any, directory: Path, *, frozen: bool, shard_size: int) -> None:
    """Let a state that is no `TrainState` write itself; options go to it where they are not the usual ones."""
    options: dict[str, Any] = {} if frozen else {"frozen": frozen}
    if shard_size != SHARD_SIZE:
        options["shard_size"] = shard_size
    state.save(directory, **options)
    try:
        _loaded_files(directory)
    except CheckpointError as error:
        raise ArgumentError(f"{type(state).__name__}.save did not write what a checkpoint is loaded from: {error}") from error


def _loaded_files(directory: Path) -> list[str]:
    """The files that loading reads, so that a manifest must list them."""
    weights = [name for name in (WEIGHTS, TRAINED) if has_tensors(directory, name)]
    names = [*(weights or [WEIGHTS]), OPTIMIZER, STATE, PROGRESS]
    return [file for name in names for file in files_of(directory, name)]


def load_checkpoint(directory: str | Path, like: State, *, group: Group = ALONE) -> tuple[State, Position]:
    """Read what `save_checkpoint` or a `AsyncCheckpointer` wrote, after verifying every file.

    It may have been written by another number of processes, and by processes that shared the state in another way.

    Args:
        directory: a checkpoint.
        like: a state of the same model and transform, for instance a freshly created one. Of a tensor that is spread over
            processes, each reads what it is to have.
        group: processes that all load the same directory at this time: each verifies some of the files.

    Returns:
        The state, and the position in the data to resume at.

    Raises:
        CheckpointError: a file is missing, of the wrong size or damaged, or the state does not fit `like`.
    """
    directory = Path(directory)
    with fail_together(group):
        undo_interrupted(directory)
        _verify(directory, (group.rank, group.size))
    document = read_document(directory, PROGRESS, version=FORMAT)
    position = Position(*(whole_number(directory / PROGRESS, document, key) for key in ("epoch", "batch")))
    load: Callable[..., State] = type(like).load  # type: ignore[attr-defined]
    return load(directory, like=like), position


def load_extra(directory: str | Path) -> dict[str, Any]:
    """The `extra` that a checkpoint was saved with.

    Args:
        directory: a checkpoint; its files are not verified.

    Returns:
        The dictionary; empty if there was none.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    extra = read_document(Path(directory), PROGRESS, version=FORMAT).get("extra", {})
    if not isinstance(extra, dict):
        raise CheckpointError(f'{Path(directory) / PROGRESS} holds "extra" of type {type(extra).__name__}; it must be an object.')
    return extra


def verify_checkpoint(directory: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        directory: a checkpoint. Files that the manifest does not list are ignored, and never read.

    Raises:
        CheckpointError: it names the file and says what is wrong with it.
    """
    _verify(Path(directory))


def _verify(directory: Path, share: tuple[int, int] = (0, 1)) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"There is no checkpoint at {directory}.")
    verify_files(directory, lambda: _loaded_files(directory), share=share)


def _progress(position: Position, extra: Mapping[str, Any] | None) -> str:
    document = {"format": FORMAT, "epoch": position.epoch, "batch": position.batch, "extra": dict(extra or {})}
    try:
        return json.dumps(document, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"save_checkpoint(extra=...) must be what JSON can hold: {error}.") from error
