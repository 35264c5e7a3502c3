"""Sharded files of DTensors: each rank writes and reads its local shards.

The files are those of `torch.distributed.checkpoint` with its storage for Hugging Face's safetensors. An index next to them lists
the files, the tensors, and the values of tensors without a dimension, such as counters, which torch's reader does not support.
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
"""Version of the index's format."""

DTYPE_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@attrs.frozen
class ShardIndex:
    """The content of an index.

    Attributes:
        folder: that contains the files of all ranks, relative to the directory.
        files: their names, relative to the directory.
        meta_tensors: dtype and shape of each tensor, on the meta device.
        scalars: the tensors without a dimension, on the CPU.
    """

    folder: str
    files: tuple[str, ...]
    meta_tensors: dict[str, Tensor]
    scalars: dict[str, Tensor]


def get_rank(process_group: Any) -> int:
    """The rank of this process in torch's process group; 0 where there is none.

    >>> get_rank(None)
    0
    """
    return distributed.get_rank(process_group) if _is_initialized() else 0


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def parts_index_name(name: str) -> str:
    """The name of the index of sharded files.

    >>> parts_index_name("model.safetensors")
    'model.safetensors.parts.json'
    """
    return f"{name}.parts.json"


def parts_folder_name(name: str) -> str:
    """The name of the folder of sharded files.

    >>> parts_folder_name("model.safetensors")
    'model.parts'
    """
    return f"{PurePath(name).stem}.parts"


def remove_sharded(directory: Path, name: str) -> None:
    """Delete the sharded files of an earlier save."""
    (directory / parts_index_name(name)).unlink(missing_ok=True)
    shutil.rmtree(directory / parts_folder_name(name), ignore_errors=True)


def save_sharded(
    directory: Path, name: str, tensors: Mapping[str, Tensor], *, file_size: int, process_group: Any = None
) -> dict[str, FileChecksum]:
    """Write the local shards of this rank; collective.

    Args:
        directory: exists, on a file system that all ranks share, and has nothing of that name.
        name: of the file without sharding, such as "model.safetensors".
        tensors: by name, sharded (each rank writes its local shards) or replicated (one rank writes them).
        file_size: limit of the bytes, summed over ranks, of the files with the same number.
        process_group: torch's process group; by default that of all processes, if there is one.

    Returns:
        The checksums of the files of this rank, by their names relative to the directory.

    Raises:
        CheckpointError: a rank could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    rank = get_rank(process_group)
    folder = directory / parts_folder_name(name)
    folder.mkdir(exist_ok=True)
    scalars = {key: to_local(tensor) for key, tensor in tensors.items() if tensor.ndim == 0}
    sharded = {key: tensor for key, tensor in tensors.items() if tensor.ndim}
    if sharded:
        writer = HuggingFaceStorageWriter(str(folder), _file_numbers(sharded, file_size), save_distributed=True)
        try:
            with _ignore_no_dist_warning():
                save(sharded, storage_writer=writer, process_group=process_group, no_dist=not _is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f"{directory} could not be written: {_error_text(error)}.") from error
    if rank == 0:
        document = {
            "format": FORMAT,
            "files": sorted(f"{folder.name}/{path.name}" for path in folder.iterdir()),
            "tensors": {key: {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)} for key, tensor in sharded.items()},
            "numbers": {key: {"dtype": DTYPES[scalar.dtype], "value": scalar.item()} for key, scalar in scalars.items()},
        }
        (directory / parts_index_name(name)).write_text(json.dumps(document) + "\n", encoding="utf-8")
    own = folder.glob(f"shard-{rank + 1:05d}-*")
    return {f"{folder.name}/{path.name}": compute_checksum(path) for path in own}


def read_index(directory: Path, name: str) -> ShardIndex:
    """Read the index.

    Raises:
        CheckpointError: the index is missing or corrupt, or names a file outside the folder.
    """
    path, folder = directory / parts_index_name(name), parts_folder_name(name)
    document = read_json(directory, parts_index_name(name), version=FORMAT)
    files = check_type(document.get("files"), list[str], f"files of {path}")
    for file in files:
        if PurePath(file).parts != (folder, PurePath(file).name):
            raise CheckpointError(f"{path} names the file {file!r}; only files in {folder} can be used.")
    tensors = check_type(document.get("tensors"), dict[str, dict[str, Any]], f"tensors of {path}")
    numbers = check_type(document.get("numbers"), dict[str, dict[str, Any]], f"numbers of {path}")
    try:
        meta_tensors = {key: _meta_tensor(entry) for key, entry in tensors.items()}
        scalars = {key: torch.tensor(entry["value"], dtype=DTYPE_BY_NAME[entry["dtype"]]) for key, entry in numbers.items()}
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} is corrupt: {type(error).__name__}: {error}. Use an earlier checkpoint.") from error
    if wrong := [key for key, scalar in scalars.items() if scalar.ndim]:
        raise CheckpointError(f"{path} is corrupt: {wrong[0]!r} is not a number. Use an earlier checkpoint.")
    return ShardIndex(folder, tuple(files), meta_tensors, scalars)


def load_sharded(directory: Path, name: str, targets: Mapping[str, Tensor]) -> None:
    """Read into existing tensors: each rank its local shards, without communication.

    Args:
        directory: that contains the files.
        name: see `save_sharded`.
        targets: tensors with names, shapes and dtypes of the index, with any placements; not necessarily all.

    Raises:
        CheckpointError: a file is missing or corrupt, or the files do not cover the tensors.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    index = read_index(directory, name)
    folder = directory / index.folder
    for key in targets.keys() & index.scalars.keys():
        to_local(targets[key]).copy_(index.scalars[key])
    remaining: dict[str, Any] = {key: target for key, target in targets.items() if key not in index.scalars}
    if not remaining:
        return
    _check_files(directory, index)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        _check_shapes(folder, reader, remaining)
        with _ignore_no_dist_warning():
            load(remaining, storage_reader=reader, no_dist=True)
    except CheckpointError:
        raise
    # corrupt files lead to many errors, also in torch's threads
    except (CheckpointException, Exception) as error:
        raise CheckpointError(f"{folder} cannot be read: {_error_text(error)}. Use an earlier checkpoint.") from error


@contextmanager
def _ignore_no_dist_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _check_files(directory: Path, index: ShardIndex) -> None:
    """Check that the folder has the files of the index, and no others: torch reads all files in it."""
    for file in index.files:
        resolve_file(directory, file)
    existing = {f"{index.folder}/{path.name}" for path in (directory / index.folder).iterdir()}
    if unknown := sorted(existing - set(index.files)):
        raise CheckpointError(f"{directory / unknown[0]} is not of this checkpoint. Delete it, or use an earlier checkpoint.")


def _check_shapes(folder: Path, reader: Any, targets: Mapping[str, Tensor]) -> None:
    metadata = reader.read_metadata().state_dict_metadata
    for key, target in targets.items():
        if key not in metadata:
            raise CheckpointError(f"{folder} has no {key!r}. Use an earlier checkpoint.")
        saved = metadata[key]
        numel = sum(math.prod(chunk.sizes) for chunk in saved.chunks)
        if numel != target.numel() or saved.size != target.shape or saved.properties.dtype != target.dtype:
            raise CheckpointError(
                f"{folder} has {numel} elements of {saved.properties.dtype}{list(saved.size)} for {key!r}, which is "
                f"{target.dtype}{list(target.shape)} in the state. Use an earlier checkpoint."
            )


def _meta_tensor(entry: dict[str, Any]) -> Tensor:
    return torch.empty(check_type(entry["shape"], list[int], "shape"), dtype=DTYPE_BY_NAME[entry["dtype"]], device="meta")


def _file_numbers(tensors: Mapping[str, Tensor], file_size: int) -> dict[str, int]:
    """The file number of each tensor. Torch keeps a rank's part of a file in memory while it writes it."""
    number, remaining, numbers = 1, file_size, {}
    for key, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > remaining and remaining < file_size:
            number, remaining = number + 1, file_size
        numbers[key] = number
        remaining -= nbytes
    return numbers


def _error_text(error: BaseException) -> str:
    """The error of each rank in one line; torch collects them with stack traces."""
    failures = getattr(error, "failures", None)
    if not failures:
        return f"{type(error).__name__}: {error}"
    return "; ".join(f"process {rank}: {type(cause).__name__}: {cause}" for rank, (cause, _) in sorted(failures.items()))
