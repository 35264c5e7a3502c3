"""Sharded files: what is written is read, and changed files are errors. One process writes all shards."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from fts.errors import CheckpointError
from fts.storage import (
    compute_checksum,
    has_sharded_tensors,
    has_tensors,
    list_files,
    read_into,
    read_tensor_specs,
    read_tensors,
    save_sharded,
)
from fts.storage.dtypes import DTYPES

NAME = "model.safetensors"


def tensors():
    torch.manual_seed(0)
    found = {f"of {name}": torch.arange(6).reshape(2, 3).to(dtype) for dtype, name in DTYPES.items()}
    numbers = {"count": torch.tensor(2**62 + 1), "rate": torch.tensor(0.1), "nan": torch.tensor(float("nan"))}
    numbers |= {"on": torch.tensor(True)}
    return found | numbers | {"none": torch.zeros(0, 3), "half": torch.tensor(0.1, dtype=torch.bfloat16)}


@pytest.fixture
def written(tmp_path):
    save_sharded(tmp_path, NAME, tensors(), file_size=40)
    return tmp_path


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


def test_every_dtype_and_shape_is_read_back(written):
    assert_same(read_tensors(written, NAME), tensors())
    targets = {name: torch.empty_like(tensor) for name, tensor in tensors().items() if name in ("of BF16", "count")}
    read_into(written, NAME, targets)
    assert_same(targets, {name: tensors()[name] for name in targets})
    assert {name: (form.shape, form.dtype) for name, form in read_tensor_specs(written, NAME).items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in tensors().items()
    }


def test_the_checksums_of_all_files_are_returned(tmp_path):
    checksums = save_sharded(tmp_path, NAME, tensors(), file_size=40)
    assert len(checksums) > 3 and all(compute_checksum(tmp_path / name) == checksum for name, checksum in checksums.items())
    assert set(list_files(tmp_path, NAME)) == {f"{NAME}.parts.json", *checksums}
    assert has_tensors(tmp_path, NAME) and has_sharded_tensors(tmp_path, NAME) and not has_tensors(tmp_path, "other.safetensors")


def test_numbers_alone_need_no_files(tmp_path):
    assert save_sharded(tmp_path, NAME, {"count": torch.tensor(3)}, file_size=40) == {}
    assert_same(read_tensors(tmp_path, NAME), {"count": torch.tensor(3)})


def edit(written, change):
    path = written / f"{NAME}.parts.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def files_in(written):
    return sorted((written / "model.parts").iterdir())


CORRUPTIONS = {
    "a file is missing": lambda written: files_in(written)[1].unlink(),
    "a file is truncated": lambda written: files_in(written)[1].write_bytes(files_in(written)[1].read_bytes()[:-3]),
    "a file is not safetensors": lambda written: files_in(written)[1].write_bytes(b"\x80\x04." * 9),
    "there is another file": lambda written: save_file({"x": torch.ones(2)}, written / "model.parts" / "more.safetensors"),
    "a file is another one": lambda written: shutil.copyfile(files_in(written)[0], files_in(written)[1]),
    "the index leads outside": lambda written: edit(written, lambda index: index["files"].append("../secret.safetensors")),
    "the index has another folder": lambda written: edit(written, lambda index: index["files"].append("other/a.safetensors")),
    "a shape is another": lambda written: edit(written, lambda index: index["tensors"]["of F32"].update(shape=[3, 3])),
    "a dtype is another": lambda written: edit(written, lambda index: index["tensors"]["of F32"].update(dtype="F64")),
    "a dtype is none": lambda written: edit(written, lambda index: index["tensors"]["of F32"].update(dtype="F99")),
    "a number is a list": lambda written: edit(written, lambda index: index["numbers"]["count"].update(value=[1, 2])),
    "a number is too large": lambda written: edit(written, lambda index: index["numbers"]["count"].update(value=2**80)),
    "there is no list of files": lambda written: edit(written, lambda index: index.pop("files")),
    "the format is later": lambda written: edit(written, lambda index: index.update(format=2)),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_an_error(written, name):
    CORRUPTIONS[name](written)
    with pytest.raises(CheckpointError):
        read_tensors(written, NAME)
