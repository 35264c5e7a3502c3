import json

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from fts.errors import ArgumentError, CheckpointError
from fts.storage import list_files, read_tensors, split_into_shards, write_contents
from fts.storage.tensor_files import DTYPES

NAME = "model.safetensors"


def tensors_of():
    return {"embedding": torch.randn(4, 3), "bias": torch.randn(5).half(), "large": torch.randn(40), "count": torch.tensor(3)}


def saved(directory, shard_size, tensors=None):
    directory.mkdir(exist_ok=True)
    write_contents(directory, split_into_shards(NAME, tensors or tensors_of(), shard_size))
    return directory


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_by_safetensors_itself(tmp_path, dtype):
    tensor = torch.arange(6).to(dtype) if dtype != torch.bool else torch.tensor([True, False])
    write_contents(tmp_path, split_into_shards(NAME, {"x": tensor, "y": torch.ones(())}))
    with safetensors.safe_open(tmp_path / NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = file.get_tensor("x")
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_what_the_format_does_not_support_is_an_error():
    with pytest.raises(ArgumentError, match=r"'x' has dtype torch\.complex128"):
        split_into_shards(NAME, {"x": torch.zeros(1, dtype=torch.complex128)})
    for size in (0, -1, 1.5, True, "5GB"):
        with pytest.raises(ArgumentError, match="shard_size="):
            split_into_shards(NAME, {}, size)


@pytest.mark.parametrize("shard_size", [1, 50, 70, 10**6])
def test_shards_have_every_tensor_once_within_the_size(tmp_path, shard_size):
    tensors = tensors_of()
    saved(tmp_path, shard_size, tensors)
    found = read_tensors(tmp_path, NAME)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    if shard_size == 10**6:
        assert [path.name for path in tmp_path.iterdir()] == [NAME] and list_files(tmp_path, NAME) == (NAME,)
        return
    index = json.loads((tmp_path / f"{NAME}.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    shards = sorted(tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert [path.name for path in shards] == [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    assert list_files(tmp_path, NAME) == (f"{NAME}.index.json", *(path.name for path in shards))
    for path in shards:
        content = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == content.keys()
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= shard_size


def test_the_split_is_that_of_transformers(tmp_path):
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {f"layer.{number}": torch.zeros(10) for number in range(7)}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=90, filename_pattern="model{suffix}.safetensors")
    saved(tmp_path, 90, tensors)
    ours = json.loads((tmp_path / f"{NAME}.index.json").read_text())
    assert ours == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}


def test_what_an_earlier_layout_left_is_removed(tmp_path):
    (tmp_path / "model-card.md").write_text("kept")
    few, many, one = tensors_of(), {f"{n}": torch.zeros(9) for n in range(9)}, {"w": torch.ones(2)}
    for tensors, size, count in ((few, 10**6, 1), (many, 36, 9), (few, 1, 4), (one, 10**6, 1)):
        saved(tmp_path, size, tensors)
        assert read_tensors(tmp_path, NAME).keys() == tensors.keys()
        assert len(list(tmp_path.glob("*.safetensors"))) == count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model-card.md", NAME]


# Corrupt files


def index_of(directory):
    return directory / f"{NAME}.index.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "list"),
        ("{}", "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"w": 1}}', "weight_map"),
        ('{"weight_map": {"w": "../outside.safetensors"}}', "outside"),
        ('{"weight_map": {"w": "/etc/hostname"}}', "only files next to it"),
        ('{"weight_map": {"w": "sub/a.safetensors"}}', "only files next to it"),
        ('{"weight_map": {"w": ".."}}', "only files next to it|is not inside"),
        ('{"weight_map": {"w": ""}}', "is not inside"),
        ('{"weight_map": {"w": "nothing.safetensors"}}', "missing"),
        ('{"weight_map": {"w": "linked.safetensors"}}', "a link that leads outside"),
        ('{"weight_map": {"w": "a.safetensors", "w": "a.safetensors"}}', "'w' is there twice"),
        ('{"weight_map": {"w": "model.safetensors.index.json"}}', "cannot be read"),
        ('{"weight_map": ' + "[" * 100_000, "cannot be read"),
        ('{"weight_map": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_an_index_that_cannot_be_used(tmp_path, text, message):
    root = tmp_path / "root"
    root.mkdir()
    write_contents(tmp_path, split_into_shards("outside.safetensors", {"w": torch.ones(1)}))
    (root / "linked.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index_of(root).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(root, NAME)


def test_an_index_must_fit_its_files(tmp_path):
    saved(tmp_path, 50)
    index = json.loads(index_of(tmp_path).read_text())
    index_of(tmp_path).write_text(json.dumps({"weight_map": index["weight_map"] | {"more": "model-00001-of-00004.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"does not fit model-00001-of-00004\.safetensors: 'more'"):
        read_tensors(tmp_path, NAME)
    with pytest.raises(CheckpointError, match=r"other\.safetensors is missing"):
        read_tensors(tmp_path, "other.safetensors")


HEADERS = [
    {"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F32", "shape": [2**64], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}},
    {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
    {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}},
    {"w": 5},
    [],
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_cannot_be_used(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / NAME).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        read_tensors(tmp_path, NAME)
