"""Checkpoints that are whole or absent, and never unpickled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

from fts.errors import ArgumentError, CheckpointError
from fts.loops.position import Position
from fts.state import OPTIMIZER, STATE, WEIGHTS

FORMAT = 1
"""Version of the files that `save_checkpoint` writes beside those of the state."""

MANIFEST, PROGRESS = "manifest.json", "progress.json"

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


def write_whole(directory: str | Path, fill: Callable[[Path], None]) -> Path:
    """Write a directory that is, at any instant, either complete or not there, as `save_checkpoint` does.

    Args:
        directory: where it shall be; an earlier one of that name is replaced.
        fill: called with the hidden directory, to write the files.

    Returns:
        The directory.

    Raises:
        CheckpointError: the disk is full or not writable. What was there before stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     path = write_whole(f"{root}/notes", lambda hidden: hidden.joinpath("a.txt").write_text("a") and None)
    ...     sorted(file.name for file in path.iterdir())
    ['a.txt', 'manifest.json']
    """
    from safetensors import SafetensorError  # what safetensors makes of an OSError

    directory = Path(directory)
    try:
        _write_whole(directory, fill)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}. Earlier checkpoints are whole. Make room or choose another directory, "
            "then resume from the newest one."
        ) from error
    return directory


def _write_whole(directory: Path, fill: Callable[[Path], None]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    _undo_interrupted(directory)
    hidden = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(hidden, ignore_errors=True)  # left by a run that died here
    hidden.mkdir()
    try:
        fill(hidden)
        _seal(hidden)
        _replace(directory, hidden)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        _undo_interrupted(directory)
        raise


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
    _undo_interrupted(directory)
    verify_checkpoint(directory)
    document = _read_json(directory / PROGRESS)
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
    extra = _read_json(path).get("extra", {})
    if not isinstance(extra, dict):
        raise CheckpointError(f'{path} holds "extra" of type {type(extra).__name__}; it must be an object.')
    return extra


def checkpoints_in(root: str | Path) -> dict[int, Path]:
    """The checkpoints of a directory by step, in order; whole or not."""
    names = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(root).glob("checkpoint-*"))
    return dict(sorted((int(name[1]), path) for name, path in names if name))


def newest_checkpoint(root: str | Path) -> Path | None:
    """The checkpoint of the highest step that is whole.

    Args:
        root: a directory with `checkpoint-<step>` directories; it need not exist.

    Returns:
        Its path; None if there is none. Damaged and incomplete ones are passed over.
    """
    root = Path(root)
    if not root.is_dir():
        return None
    for entry in list(root.iterdir()):
        aside = re.fullmatch(r"\.(checkpoint-\d+)\.replaced", entry.name)
        if aside:
            _undo_interrupted(root / aside[1])
    steps = checkpoints_in(root).items()
    return next((path for _, path in reversed(steps) if is_whole(path)), None)


def is_whole(directory: str | Path) -> bool:
    """Whether `verify_checkpoint` finds nothing wrong."""
    try:
        verify_checkpoint(directory)
    except CheckpointError:
        return False
    return True


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
    manifest = directory / MANIFEST
    files = _read_json(manifest).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{manifest} does not list the checkpoint's files. Use an earlier checkpoint.")
    for name in LOADED:
        if name not in files:
            raise CheckpointError(f"{manifest} does not list {name}, so nothing vouches for it. Use an earlier checkpoint.")
    for name, entry in files.items():
        if PurePath(name).anchor or ".." in PurePath(name).parts or not isinstance(entry, dict):
            raise CheckpointError(f"{manifest} has an entry that cannot be used: {name!r}.")
        _verify(directory / name, entry)


def _verify(path: Path, entry: dict[str, Any]) -> None:
    remedy = "The checkpoint is damaged; use an earlier one."
    try:
        size = path.stat().st_size
        if size != entry.get("size"):
            raise CheckpointError(f"{path} has {size} bytes, but was written with {entry.get('size')}. {remedy}")
        digest = _digest(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}. {remedy}") from error
    if digest != entry.get("sha256"):
        raise CheckpointError(f"{path} has changed since it was written: its SHA-256 differs. {remedy}")


def _progress(position: Position, extra: Mapping[str, Any] | None) -> str:
    document = {"format": FORMAT, "epoch": position.epoch, "batch": position.batch, "extra": dict(extra or {})}
    try:
        return json.dumps(document, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"save_checkpoint(extra=...) must be what JSON can hold: {error}.") from error


def _seal(directory: Path) -> None:
    """Flush every file, list them in the manifest, and flush that too."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)} for path in paths}
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")
    for path in [*paths, directory / MANIFEST]:
        _flush(path)
    for path in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        _flush(path)


def _replace(directory: Path, sealed: Path) -> None:
    aside = _aside(directory)
    for attempt in range(3):
        if directory.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(directory, aside)
        try:
            os.rename(sealed, directory)
            break
        except OSError as error:
            # a reader took the gap for an interrupted replacement and moved the old one back
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 2:
                raise
    _flush(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _undo_interrupted(directory: Path) -> None:
    """Finish what a run that died inside `_replace` left: move an old checkpoint back, or delete it if it was replaced."""
    aside = _aside(directory)
    if not aside.exists():
        return
    if directory.exists():
        shutil.rmtree(aside, ignore_errors=True)
        return
    try:
        os.rename(aside, directory)
    except FileNotFoundError:  # another process was faster
        return


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, so this is no complete checkpoint.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(f"{path} has format {found!r}; this version of fts reads format {FORMAT}.")
    return document


def _whole(path: Path, document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{path} has {key} = {value!r}; a whole number of at least 0 is needed.")
    return value
