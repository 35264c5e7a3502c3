"""Tensors, documents and records as files: how they are written so that one notices damage, and read with suspicion."""

from fts.storage.files import Written, file_in, flush, measure, write_image
from fts.storage.json_io import read_document, whole_number
from fts.storage.schema import checked, record
from fts.storage.sharded import rank_in, save_sharded
from fts.storage.staging import StagingBuffer
from fts.storage.tensors import (
    SHARD_SIZE,
    Contents,
    TensorFile,
    files_of,
    forms_of,
    has_tensors,
    is_spread,
    lay_out,
    map_file,
    read_into,
    read_tensors,
    take_part,
    write,
    write_texts,
)

__all__ = [
    "SHARD_SIZE",
    "Contents",
    "StagingBuffer",
    "TensorFile",
    "Written",
    "checked",
    "file_in",
    "files_of",
    "flush",
    "forms_of",
    "has_tensors",
    "is_spread",
    "lay_out",
    "map_file",
    "measure",
    "rank_in",
    "read_document",
    "read_into",
    "read_tensors",
    "record",
    "save_sharded",
    "take_part",
    "whole_number",
    "write",
    "write_image",
    "write_texts",
]
