"""Tensors, documents and records as files: how they are written so that one notices damage, and read with suspicion."""

from fts.storage.documents import read_document, whole_number
from fts.storage.files import Written, file_in, flush, measure, write_image
from fts.storage.image import Image
from fts.storage.records import checked, record
from fts.storage.tensors import SHARD_SIZE, Contents, TensorFile, files_of, has_tensors, lay_out, read_tensors, write, write_texts

__all__ = [
    "SHARD_SIZE",
    "Contents",
    "Image",
    "TensorFile",
    "Written",
    "checked",
    "file_in",
    "files_of",
    "flush",
    "has_tensors",
    "lay_out",
    "measure",
    "read_document",
    "read_tensors",
    "record",
    "whole_number",
    "write",
    "write_image",
    "write_texts",
]
