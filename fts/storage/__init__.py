"""Files of tensors and JSON: written atomically and with checksums, and validated when they are read."""

from fts.storage.files import FileChecksum, compute_checksum, fsync, resolve_file, write_direct
from fts.storage.json_io import get_int, read_json
from fts.storage.schema import check_type, structure
from fts.storage.sharded import get_rank, save_sharded
from fts.storage.staging import StagingBuffer
from fts.storage.tensor_files import (
    MAX_SHARD_SIZE,
    DirectoryContents,
    TensorFile,
    has_sharded_tensors,
    has_tensors,
    join_gather,
    list_files,
    mmap_file,
    read_into,
    read_tensor_specs,
    read_tensors,
    split_into_shards,
    write_contents,
    write_text_files,
)

__all__ = [
    "MAX_SHARD_SIZE",
    "DirectoryContents",
    "FileChecksum",
    "StagingBuffer",
    "TensorFile",
    "check_type",
    "compute_checksum",
    "fsync",
    "get_int",
    "get_rank",
    "has_sharded_tensors",
    "has_tensors",
    "join_gather",
    "list_files",
    "mmap_file",
    "read_into",
    "read_json",
    "read_tensor_specs",
    "read_tensors",
    "resolve_file",
    "save_sharded",
    "split_into_shards",
    "structure",
    "write_contents",
    "write_direct",
    "write_text_files",
]
