"""Checkpoints that are whole or absent, and never unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fts.errors import ArgumentError, CheckpointError
from fts.loops.manifest import FORMAT, read_json, verify_files
from fts.loops.position import Position
from fts.loops.whole import undo_interrupted, write_whole
from fts.state import OPTIMIZER, STATE, WEIGHTS

PROGRESS = "progress.json"

LOADED = (WEIGHTS, OPTIMIZER, STATE, PROGRESS)
"""The files that loading reads, so that a manifest must list them."""

State = TypeVar("State")


def save_checkpoint(
    directory: str | Path,
    state: Any,
    position: Position = Position(),
    *,
    extra: Mapping[str, Any] | None = None,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint that is, at any instant, either complete at `directory` or not there.

    The files are written to a hidden directory beside it, flushed to the disk, listed with size and SHA-256 in
    `manifest.json`, and the directory is renamed. An earlier checkpoint of the same name is moved aside first and
    deleted last; if the run dies between the two renames, the next load moves it back.

    Args:
        directory: where the checkpoint shall be, by convention `.../checkpoint-<step>`; parents are made.
        state: a `TrainState`, or what has a `save(directory)` that writes the same files.
        position: where in the data to resume.
        extra: what else to keep; anything that JSON can hold.
        write: called with the hidden directory before it is sealed, to add files such as `config.json`.

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
    if not callable(getattr(state, "save", None)):
        raise ArgumentError(
            f"save_checkpoint was given a state of type {type(state).__name__}, which has no `save`. Give a TrainState, or call "
            "save_checkpoint for each of several in directories of their own."
        )
    directory = Path(directory)
    progress = _progress(position, extra)

    def fill(hidden: Path) -> None:
        if write is not None:
            write(hidden)  # first, so that nothing it writes stands for the state
        state.save(hidden)
        (hidden / PROGRESS).write_text(progress)
        lacking = [name for name in LOADED if not (hidden / name).is_file()]
        if lacking:
            raise ArgumentError(f"{type(state).__name__}.save wrote no {lacking[0]}, which a checkpoint is loaded from.")

    return write_whole(directory, fill)


def load_checkpoint(directory: str | Path, like: State) -> tuple[State, Position]:
    """Read what `save_checkpoint` wrote, after verifying every file.

    Args:
        directory: a checkpoint.
        like: a state of the same model and transform, for instance a freshly created one.

    Returns:
        The state, and the position in the data to resume at.

    Raises:
        CheckpointError: a file is missing, of the wrong size or damaged, or the state does not fit `like`.
    """
    directory = Path(directory)
    undo_interrupted(directory)
    verify_checkpoint(directory)
    document = read_json(directory / PROGRESS)
    position = Position(*(_whole(directory / PROGRESS, document, key) for key in ("epoch", "batch")))
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
    path = Path(directory) / PROGRESS
    extra = read_json(path).get("extra", {})
    if not isinstance(extra, dict):
        raise CheckpointError(f'{path} holds "extra" of type {type(extra).__name__}; it must be an object.')
    return extra


def verify_checkpoint(directory: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        directory: a checkpoint. Files that the manifest does not list are ignored, and never read.

    Raises:
        CheckpointError: it names the file and says what is wrong with it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"There is no checkpoint at {directory}.")
    verify_files(directory, LOADED)


def _progress(position: Position, extra: Mapping[str, Any] | None) -> str:
    document = {"format": FORMAT, "epoch": position.epoch, "batch": position.batch, "extra": dict(extra or {})}
    try:
        return json.dumps(document, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"save_checkpoint(extra=...) must be what JSON can hold: {error}.") from error


def _whole(path: Path, document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{path} has {key} = {value!r}; a whole number of at least 0 is needed.")
    return value
