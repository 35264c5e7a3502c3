"""Tensors that several processes hold parts of, in files: each process writes and reads its own parts.

The files are those of `torch.distributed.checkpoint` with its storage for Hugging Face's safetensors. An index beside them lists
them, the tensors, and the values of those without a dimension, such as counters: they are no tensors for torch's reader.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import attrs
import torch
from torch import Tensor, distributed

from fts.dtensors import to_local
from fts.errors import CheckpointError
from fts.storage.dtypes import DTYPES
from fts.storage.files import FileChecksum, compute_checksum, resolve_file
from fts.storage.json_io import read_json
from fts.storage.schema import check_type

FORMAT = 1
"""Version of an index."""

DTYPE_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@attrs.frozen
class ShardIndex:
    """What an index says.

    Attributes:
        folder: where the files of all processes lie, relative to the directory.
        files: their names, relative to the directory.
        meta_tensors: dtype and shape of each tensor, on the meta device.
        scalars: the tensors that have no dimension, on the CPU.
    """

    folder: str
    files: tuple[str, ...]
    meta_tensors: dict[str, Tensor]
    scalars: dict[str, Tensor]


def get_rank(process_group: Any) -> int:
    """The number of this process in a process group of torch's; 0 where there is none.

    >>> get_rank(None)
    0
    """
    return distributed.get_rank(process_group) if _is_initialized() else 0


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def index_name(name: str) -> str:
    """The name of the index for what would be one file.

    >>> index_name("model.safetensors")
    'model.safetensors.parts.json'
    """
    return f"{name}.parts.json"


def folder_name(name: str) -> str:
    """The name of the folder for what would be one file.

    >>> folder_name("model.safetensors")
    'model.parts'
    """
    return f"{PurePath(name).stem}.parts"


def remove_sharded(directory: Path, name: str) -> None:
    """Delete what an earlier writer left."""
    (directory / index_name(name)).unlink(missing_ok=True)
    shutil.rmtree(directory / folder_name(name), ignore_errors=True)


def save_sharded(
    directory: Path, name: str, tensors: Mapping[str, Tensor], *, file_size: int, process_group: Any = None
) -> dict[str, FileChecksum]:
    """Write what this process has of tensors; all processes of a group call it at the same time.

    Args:
        directory: is there, in a file system that all share, and has nothing of that name.
        name: of the one file that it would be, such as "model.safetensors".
        tensors: by name, spread over the processes (each writes what it has) or the same in all (one of them writes it).
        file_size: bytes of tensors, all processes taken together, that the files of one number may have.
        process_group: torch's process group; by default that of all processes, if there is one.

    Returns:
        The files of this process, relative to the directory, with their checksums.

    Raises:
        CheckpointError: a process could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    rank = get_rank(process_group)
    folder = directory / folder_name(name)
    folder.mkdir(exist_ok=True)
    numbers = {key: to_local(tensor) for key, tensor in tensors.items() if tensor.ndim == 0}
    cut = {key: tensor for key, tensor in tensors.items() if tensor.ndim}
    if cut:
        writer = HuggingFaceStorageWriter(str(folder), _file_numbers(cut, file_size), save_distributed=True)
        try:
            with _ignore_no_dist_warning():
                save(cut, storage_writer=writer, process_group=process_group, no_dist=not _is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f"{directory} could not be written: {_error_text(error)}.") from error
    if rank == 0:
        document = {
            "format": FORMAT,
            "files": sorted(f"{folder.name}/{path.name}" for path in folder.iterdir()),
            "tensors": {key: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)} for key, tensor in cut.items()},
            "numbers": {key: {"dtype": DTYPES[number.dtype], "value": number.item()} for key, number in numbers.items()},
        }
        (directory / index_name(name)).write_text(json.dumps(document) + "\n", encoding="utf-8")
    own = folder.glob(f"shard-{rank + 1:05d}-*")
    return {f"{folder.name}/{path.name}": compute_checksum(path) for path in own}


def read_index(directory: Path, name: str) -> ShardIndex:
    """What there is.

    Raises:
        CheckpointError: the index is missing or damaged, or names a file outside the folder.
    """
    path, folder = directory / index_name(name), folder_name(name)
    document = read_json(directory, index_name(name), version=FORMAT)
    files = check_type(document.get("files"), list[str], f"files of {path}")
    for file in files:
        if PurePath(file).parts != (folder, PurePath(file).name):
            raise CheckpointError(f"{path} names the file {file!r}; only files in {folder} can be used.")
    tensors = check_type(document.get("tensors"), dict[str, dict[str, Any]], f"tensors of {path}")
    numbers = check_type(document.get("numbers"), dict[str, dict[str, Any]], f"numbers of {path}")
    try:
        forms = {key: _meta_tensor(entry) for key, entry in tensors.items()}
        values = {key: torch.tensor(entry["value"], dtype=DTYPE_BY_NAME[entry["dtype"]]) for key, entry in numbers.items()}
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}. Use an earlier checkpoint.") from error
    if wrong := [key for key, value in values.items() if value.ndim]:
        raise CheckpointError(f"{path} is damaged: {wrong[0]!r} is no number. Use an earlier checkpoint.")
    return ShardIndex(folder, tuple(files), forms, values)


def load_sharded(directory: Path, name: str, targets: Mapping[str, Tensor]) -> None:
    """Read tensors into memory that is there: each process what it has of them. Nothing is sent.

    Args:
        directory: where they were written.
        name: see `save_sharded`.
        targets: tensors with names, shapes and dtypes of the index, spread in any way, or whole; not necessarily all.

    Raises:
        CheckpointError: a file is missing or damaged, or they do not make up the tensors.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    parts = read_index(directory, name)
    folder = directory / parts.folder
    for key in targets.keys() & parts.scalars.keys():
        to_local(targets[key]).copy_(parts.scalars[key])
    wanted: dict[str, Any] = {key: target for key, target in targets.items() if key not in parts.scalars}
    if not wanted:
        return
    _check_files(directory, parts)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        _check_shapes(folder, reader, wanted)
        with _ignore_no_dist_warning():  # each reads for itself
            load(wanted, storage_reader=reader, no_dist=True)
    except CheckpointError:
        raise
    # what damage of the files leads to, here and in torch's threads
    except (CheckpointException, Exception) as error:
        raise CheckpointError(f"{folder} cannot be read: {_error_text(error)}. Use an earlier checkpoint.") from error


@contextmanager
def _ignore_no_dist_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _check_files(directory: Path, parts: ShardIndex) -> None:
    """Torch reads whatever lies in the folder, so nothing else may."""
    for file in parts.files:
        resolve_file(directory, file)
    there = {f"{parts.folder}/{path.name}" for path in (directory / parts.folder).iterdir()}
    if unknown := sorted(there - set(parts.files)):
        raise CheckpointError(f"{directory / unknown[0]} is not of this checkpoint. Delete it, or use an earlier checkpoint.")


def _check_shapes(folder: Path, reader: Any, wanted: Mapping[str, Tensor]) -> None:
    found = reader.read_metadata().state_dict_metadata
    for key, target in wanted.items():
        if key not in found:
            raise CheckpointError(f"{folder} has no {key!r}. Use an earlier checkpoint.")
        numbers = sum(math.prod(chunk.sizes) for chunk in found[key].chunks)
        if numbers != target.numel() or found[key].size != target.shape or found[key].properties.dtype != target.dtype:
            raise CheckpointError(
                f"{folder} has {numbers} numbers of {found[key].properties.dtype}{list(found[key].size)} for {key!r}, which is "
                f"{target.dtype}{list(target.shape)} here. Use an earlier checkpoint."
            )


def _meta_tensor(entry: dict[str, Any]) -> Tensor:
    return torch.empty(check_type(entry["shape"], list[int], "shape"), dtype=DTYPE_BY_NAME[entry["dtype"]], device="meta")


def _file_numbers(tensors: Mapping[str, Tensor], file_size: int) -> dict[str, int]:
    """The number of the file of each tensor. Torch holds a process's part of a file in memory while it writes it."""
    number, room, found = 1, file_size, {}
    for key, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > room and room < file_size:
            number, room = number + 1, file_size
        found[key] = number
        room -= nbytes
    return found


def _error_text(error: BaseException) -> str:
    """What a process met, in one line; torch collects it with the places in its code."""
    failures = getattr(error, "failures", None)
    if not failures:
        return f"{type(error).__name__}: {error}"
    return "; ".join(f"process {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in sorted(failures.items()))
