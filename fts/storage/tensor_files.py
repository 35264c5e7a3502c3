"""Tensors in safetensors files, in one file or in several with an index, in the layout of Hugging Face."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePath

import attrs
import torch
from torch import Tensor

from fts.dtensors import copy_into, full_tensor
from fts.errors import ArgumentError, CheckpointError
from fts.storage.dtypes import DTYPES
from fts.storage.files import FileChecksum, resolve_file, write_chunks
from fts.storage.json_io import read_json
from fts.storage.sharded import load_sharded, parts_index_name, read_index, remove_sharded

MAX_SHARD_SIZE = 50 * 10**9
"""The most bytes of tensors in one file, as in `save_pretrained` of transformers."""

ALIGNMENT = 64
"""Bytes to which the data of a file is aligned."""


@attrs.frozen(eq=False)
class TensorFile:
    """One file before it is written.

    Attributes:
        name: of the file.
        header: its first bytes; the data of the tensors follows without gaps.
        tensors: in the order of their data.
        keys: the names of the tensors.
    """

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]
    keys: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@attrs.frozen(eq=False)
class DirectoryContents:
    """The files to be written to a directory.

    Attributes:
        files: with tensors.
        texts: small text files by name.
        base_names: the names without sharding; files of an earlier save under these names are removed.
    """

    files: tuple[TensorFile, ...] = ()
    texts: Mapping[str, str] = attrs.field(factory=dict)
    base_names: Collection[str] = ()

    def __add__(self, other: DirectoryContents) -> DirectoryContents:
        return DirectoryContents(
            (*self.files, *other.files), {**self.texts, **other.texts}, (*self.base_names, *other.base_names)
        )


def split_into_shards(name: str, tensors: Mapping[str, Tensor], shard_size: int = MAX_SHARD_SIZE) -> DirectoryContents:
    """Files for tensors: one, or several with an index if one would be too large.

    Args:
        name: of the file, such as "model.safetensors"; several are "model-00001-of-00003.safetensors" and so on, and their index
            is "model.safetensors.index.json".
        tensors: by name. They may share storage; nothing is copied yet.
        shard_size: the most bytes of tensors in a file; a larger tensor has a file of its own.

    Raises:
        ArgumentError: the size is not positive, or the format does not support the dtype of a tensor.

    >>> contents = split_into_shards("a.safetensors", {"x": torch.zeros(4), "y": torch.zeros(4)}, shard_size=16)
    >>> [file.name for file in contents.files], list(contents.texts)
    (['a-00001-of-00002.safetensors', 'a-00002-of-00002.safetensors'], ['a.safetensors.index.json'])
    """
    if isinstance(shard_size, bool) or not isinstance(shard_size, int) or shard_size < 1:
        raise ArgumentError(f"shard_size={shard_size!r} must be a positive number of bytes.")
    shards: list[dict[str, Tensor]] = [{}]
    remaining = shard_size
    for key, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > remaining:
            shards.append({})
            remaining = shard_size
        shards[-1][key] = tensor
        remaining -= tensor.nbytes
    if len(shards) == 1:
        return DirectoryContents((_tensor_file(name, shards[0]),), base_names=(name,))
    stem, suffix = PurePath(name).stem, PurePath(name).suffix
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {key: file for file, shard in zip(names, shards, strict=True) for key in shard},
    }
    files = tuple(_tensor_file(file, shard) for file, shard in zip(names, shards, strict=True))
    return DirectoryContents(files, {_index_name(name): json.dumps(index, indent=2) + "\n"}, (name,))


def _tensor_file(name: str, tensors: Mapping[str, Tensor]) -> TensorFile:
    # by element size, so that each tensor is aligned
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in ordered:
        if tensor.dtype not in DTYPES:
            raise ArgumentError(
                f"{key!r} has dtype {tensor.dtype}, which safetensors does not support. Convert it to another one."
            )
        end = offset + tensor.nbytes
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    keys, parts = tuple(key for key, _ in ordered), tuple(tensor for _, tensor in ordered)
    return TensorFile(name, len(text).to_bytes(8, "little") + text, parts, keys)


def write_contents(directory: Path, contents: DirectoryContents) -> dict[str, FileChecksum]:
    """Write the files, from the tensors themselves.

    Sharded tensors are gathered one after the other: the other ranks call `join_gather`, also if an error ends the writing.

    Returns:
        The sizes and checksums of the files of tensors, by name.
    """
    full_tensors = _full_tensors(contents.files)
    try:
        write_text_files(directory, contents)
        return {file.name: write_chunks(directory / file.name, _file_chunks(file, full_tensors)) for file in contents.files}
    finally:
        for _ in full_tensors:  # the other ranks take part in all gathers
            pass


def mmap_file(directory: Path, file: TensorFile) -> dict[str, Tensor]:
    """Create a file of zeros and map it into memory: what is written to the tensors is written to the file.

    Args:
        directory: of the file.
        file: only the shapes and dtypes of its tensors count.

    Returns:
        Tensors by name.
    """
    path = directory / file.name
    with path.open("wb") as opened:
        opened.write(file.header)
        opened.truncate(file.size)
    memory = torch.from_file(str(path), shared=True, size=file.size, dtype=torch.uint8)
    mapped, start = {}, len(file.header)
    for key, tensor in zip(file.keys, file.tensors, strict=True):
        end = start + tensor.nbytes
        mapped[key] = memory[start:end].view(tensor.dtype).view(tensor.shape)
        start = end
    return mapped


def join_gather(contents: DirectoryContents) -> None:
    """Take part in the gathers of the rank that writes the same contents, or copies them to a `StagingBuffer`."""
    for _ in _full_tensors(contents.files):
        pass


def _full_tensors(files: Iterable[TensorFile]) -> Iterator[Tensor]:
    for file in files:
        for tensor in file.tensors:
            yield full_tensor(tensor)


def write_text_files(directory: Path, contents: DirectoryContents) -> None:
    """Write the text files alone, and remove tensor files of an earlier save."""
    for name in contents.base_names:
        pure = PurePath(name)
        shards = re.compile(rf"{re.escape(pure.stem)}-\d+-of-\d+{re.escape(pure.suffix)}")
        for path in directory.iterdir():
            if path.name in (name, _index_name(name)) or shards.fullmatch(path.name):
                path.unlink()
        remove_sharded(directory, name)
    for name, text in contents.texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def _file_chunks(file: TensorFile, full_tensors: Iterator[Tensor]) -> Iterator[bytes | memoryview]:
    yield file.header
    for tensor in islice(full_tensors, len(file.tensors)):
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _index_name(name: str) -> str:
    return f"{name}.index.json"


def list_files(directory: Path, name: str) -> tuple[str, ...]:
    """The files that are read for a name: the file itself, or an index and the files that it lists.

    Raises:
        CheckpointError: there is neither, or the index cannot be used.
    """
    if _exists(directory / name) or not _exists(directory / _index_name(name)):
        if not _exists(directory / name) and has_sharded_tensors(directory, name):
            return (parts_index_name(name), *read_index(directory, name).files)
        resolve_file(directory, name)
        return (name,)
    return (_index_name(name), *sorted(set(_weight_map(directory, name).values())))


def has_tensors(directory: Path, name: str) -> bool:
    """Whether there are tensors to read: the file of that name, or an index."""
    return any(_exists(directory / one) for one in (name, _index_name(name), parts_index_name(name)))


def has_sharded_tensors(directory: Path, name: str) -> bool:
    """Whether the tensors of that name were saved by `save_sharded`."""
    return _exists(directory / parts_index_name(name))


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def read_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Read the full tensors of a name; they are mapped from the files and must not be written.

    Raises:
        CheckpointError: a file is missing, corrupt or outside the directory, or the index does not fit the files.
    """
    first, *shards = list_files(directory, name)
    if first == parts_index_name(name):
        index = read_index(directory, name)
        tensors = {key: torch.empty_like(meta, device="cpu") for key, meta in index.meta_tensors.items()} | index.scalars
        load_sharded(directory, name, tensors)
        return tensors
    if first == name:
        return _read_file(resolve_file(directory, name))
    tensors = {}
    weight_map = _weight_map(directory, name)
    for shard in shards:
        found = _read_file(resolve_file(directory, shard))
        expected = {key for key, file in weight_map.items() if file == shard}
        if wrong := sorted(expected ^ found.keys()):
            raise CheckpointError(f"{directory / _index_name(name)} does not fit {shard}: {wrong[0]!r} is in one of them only.")
        tensors |= found
    return tensors


def read_tensor_specs(directory: Path, name: str) -> dict[str, Tensor]:
    """The shapes and dtypes of the tensors of a name, as tensors that may be on the meta device.

    Raises:
        CheckpointError: see `read_tensors`.
    """
    if list_files(directory, name)[0] != parts_index_name(name):
        return read_tensors(directory, name)
    index = read_index(directory, name)
    return index.meta_tensors | index.scalars


def read_into(directory: Path, name: str, targets: Mapping[str, Tensor]) -> None:
    """Read the tensors of a name into existing ones; of a sharded tensor, the local shard.

    There is no communication: each rank reads for itself.

    Args:
        directory: that contains the files.
        name: see `split_into_shards`.
        targets: tensors with names, shapes and dtypes of `read_tensor_specs`; not necessarily all. They are overwritten.

    Raises:
        CheckpointError: see `read_tensors`.
    """
    if list_files(directory, name)[0] == parts_index_name(name):
        load_sharded(directory, name, targets)
        return
    found = read_tensors(directory, name)
    for key, target in targets.items():
        copy_into(target, found[key])


def _weight_map(directory: Path, name: str) -> dict[str, str]:
    path = directory / _index_name(name)
    weight_map = read_json(directory, _index_name(name)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f'{path} has no "weight_map" from names of tensors to names of files.')
    for file in weight_map.values():
        if PurePath(file).name != file:
            raise CheckpointError(f"{path} names the file {file!r}; only files next to it can be used.")
    return weight_map


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    # a corrupt header leads to many errors: an unknown dtype, an impossible shape
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Use an earlier checkpoint.") from error
