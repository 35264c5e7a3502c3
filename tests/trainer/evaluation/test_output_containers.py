from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from fts.errors import BatchError
from fts.trainer.evaluation.arrays import ArrayAllocator
from fts.trainer.evaluation.output_containers import BatchedOutputs, ConcatenatedOutputs, DeviceBuffer, PaddedRows

Pair = namedtuple("Pair", "first second")


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([0, 2**40]),
)
def test_outputs_are_concatenated_and_padded(shapes, known, limit):
    batches = [torch.arange(rows * width).reshape(rows, width) for rows, width in shapes]
    total = sum(len(batch) for batch in batches)
    gathered = ConcatenatedOutputs(total if known else None, ArrayAllocator(limit))
    for batch in batches:
        gathered.add((batch, {"sums": batch.sum(1), "other": "text"}), len(batch))
    arrays, sums = gathered.arrays()[0], gathered.arrays()[1]["sums"]
    width = max(width for _, width in shapes)
    expected = torch.cat([nn.functional.pad(batch, (0, width - batch.shape[1]), value=-100) for batch in batches])
    assert arrays.tolist() == expected.tolist()
    assert sums.tolist() == torch.cat([batch.sum(1) for batch in batches]).tolist()


def test_all_dimensions_are_padded():
    rows = PaddedRows(3)
    rows.add(torch.ones(1, 1, 1))
    rows.add(torch.ones(1, 2, 3))
    rows.add(torch.ones(1, 3, 1))
    array = rows.array()
    assert array.shape == (3, 3, 3)
    assert (array != -100).sum(axis=(1, 2)).tolist() == [1, 6, 3]


def counting(monkeypatch):
    made = []
    allocate = ArrayAllocator.allocate

    def array(self, shape, dtype, replaces=None):
        made.append(shape)
        return allocate(self, shape, dtype, replaces)

    monkeypatch.setattr(ArrayAllocator, "allocate", array)
    return made


def test_known_sizes_are_allocated_once(monkeypatch):
    made = counting(monkeypatch)
    rows = PaddedRows(6)
    for size in (2, 3, 1):
        rows.add(torch.ones(size, 3))
    assert made == [(6, 3)]
    assert np.shares_memory(rows.array(), rows.store)


def test_growing_copies_little(monkeypatch):
    made = counting(monkeypatch)
    rows = PaddedRows(500)
    for width in range(1, 501):  # each batch is wider than the one before
        rows.add(torch.full((1, width), width))
    assert rows.array().shape == (500, 500)
    assert [row.max() for row in rows.array()] == list(range(1, 501))
    assert [(row != -100).sum() for row in rows.array()] == list(range(1, 501))
    assert len(made) < 35
    made.clear()
    rows = PaddedRows()
    for _ in range(1000):
        rows.add(torch.ones(1))
    assert len(made) == 11


def test_several_outputs_for_each_example_are_allocated_at_once(monkeypatch):
    made = counting(monkeypatch)
    gathered = ConcatenatedOutputs(4)
    gathered.add({"answers": torch.ones(6, 2), "loss": torch.tensor(1.0)}, 2)
    gathered.add({"answers": torch.ones(6, 2), "loss": torch.tensor(2.0)}, 2)
    assert made == [(12, 2), (1,), (2,)]
    assert gathered.arrays()["answers"].shape == (12, 2)
    assert gathered.arrays()["loss"].tolist() == [1.0, 2.0]


def test_dtypes_are_promoted_and_half_becomes_float32():
    rows = PaddedRows(3)
    rows.add(torch.tensor([1]))
    rows.add(torch.tensor([0.5], dtype=torch.bfloat16))
    rows.add(torch.tensor([2.5], dtype=torch.float16))
    assert rows.array().dtype == np.float32
    assert rows.array().tolist() == [1.0, 0.5, 2.5]
    for dtype in (torch.bool, torch.uint8):
        rows = PaddedRows(2)
        rows.add(torch.ones(1, 1, dtype=dtype))
        rows.add(torch.ones(1, 2, dtype=dtype))
        assert rows.array().astype(int).tolist() == [[1, 0], [1, 1]]


def test_more_examples_than_announced():
    rows = PaddedRows(2)
    for index in range(5):
        rows.add(torch.tensor([index]))
    assert rows.array().tolist() == [0, 1, 2, 3, 4]


def test_what_is_added_may_change_afterwards():
    buffer = torch.ones(2)
    gathered, listed = ConcatenatedOutputs(), BatchedOutputs()
    gathered.add(buffer)
    listed.add({"x": buffer})
    buffer.zero_()
    assert gathered.arrays().tolist() == [1.0, 1.0]
    assert listed.arrays()["x"][0].tolist() == [1.0, 1.0]


def test_trees_keep_their_form():
    tree = {"a": [torch.ones(1), np.zeros(1)], "b": Pair(torch.ones(1), (torch.ones(1),)), "c": OrderedDict(d=torch.ones(1))}
    gathered = ConcatenatedOutputs(2)
    gathered.add(tree, 1)
    gathered.add(tree, 1)
    found = gathered.arrays()
    assert type(found["b"]) is Pair
    assert type(found["c"]) is OrderedDict
    assert [len(found["a"][0]), len(found["b"].second[0]), len(found["c"]["d"])] == [2, 2, 2]


def test_nested_outputs_of_transformers_are_no_leaves():
    output = pytest.importorskip("transformers.modeling_outputs").BaseModelOutput
    gathered = ConcatenatedOutputs(2)
    for _ in range(2):
        gathered.add((torch.ones(1, 2), output(last_hidden_state=torch.ones(1, 3), attentions=(torch.ones(1, 4),))), 1)
    found = gathered.arrays()[1]
    assert type(found) is output
    assert found.last_hidden_state.shape == (2, 3)
    assert found.attentions[0].shape == (2, 4)


def test_errors():
    rows = PaddedRows(6)
    rows.add(torch.ones(2, 3))
    with pytest.raises(BatchError, match=r"shape \[2\] in one batch and \['examples', 3\] in others: axes differ"):
        rows.add(torch.ones(2))
    with pytest.raises(BatchError, match="no outputs"):
        PaddedRows(1).array()
    gathered = ConcatenatedOutputs(None)
    gathered.add({"a": torch.ones(1), "b": torch.ones(1)}, 1)
    with pytest.raises(BatchError, match=r"the tensors \['a'\], the first one \['a', 'b'\].*eval_do_concat_batches=False"):
        gathered.add({"a": torch.ones(1)}, 1)


def test_nothing_is_none_and_empty_stays_empty():
    assert ConcatenatedOutputs(None).arrays() is None
    gathered = ConcatenatedOutputs(None)
    gathered.add({"predictions": (), "labels": torch.ones(1)}, 1)
    assert gathered.arrays()["predictions"] == ()


def test_batches_are_kept_separate():
    listed = BatchedOutputs()
    listed.add({"predictions": (torch.ones(2, 3), torch.ones(2)), "labels": torch.zeros(2)}, 2)
    listed.add({"predictions": (torch.ones(1, 5), torch.ones(1)), "labels": torch.zeros(1)}, 1)
    found = listed.arrays()
    assert [tuple(array.shape for array in part) for part in found["predictions"]] == [((2, 3), (2,)), ((1, 5), (1,))]
    assert all(isinstance(part, np.ndarray) for part in found["labels"])


def buffered_sizes(**options):
    written = []
    buffer = DeviceBuffer(lambda tree, batch_size: written.append(batch_size), **options)
    sizes = []
    for index in range(5):
        buffer.add((torch.ones(2, 8), None), index)
        sizes.append(len(written))
    buffer.flush()
    assert written == [0, 1, 2, 3, 4]
    return sizes


def test_batches_stay_on_a_device_for_a_while(monkeypatch):
    assert buffered_sizes() == [1, 2, 3, 4, 5]  # the CPU's at once
    assert buffered_sizes(batches=2, on_cpu=True) == [0, 2, 2, 4, 4]
    assert buffered_sizes(on_cpu=True) == [0, 0, 0, 0, 0]
    monkeypatch.setattr("fts.trainer.evaluation.output_containers.BUFFER_BYTES", 128)
    assert buffered_sizes(on_cpu=True) == [0, 0, 3, 3, 3]


def test_buffered_batches_are_copies():
    output, written = torch.ones(2), []
    buffer = DeviceBuffer(lambda tree, batch_size: written.append(tree), on_cpu=True)
    buffer.add(output)
    output.zero_()
    buffer.flush()
    assert written[0].tolist() == [1.0, 1.0]
