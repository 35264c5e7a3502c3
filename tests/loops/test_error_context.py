import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fts import loops
from fts.loops import Position, cadence, fit, source, with_error_context
from fts.loops.error_context import describe_batch


def step_that_fails_at(number):
    def step(state, batch):
        if state + 1 == number:
            raise RuntimeError("bad batch")
        return state + 1, {}

    return step


def note_of(events):
    with pytest.raises(RuntimeError) as caught:
        list(events)
    (note,) = caught.value.__notes__
    return note


def test_a_note_has_step_epoch_batch_and_examples():
    data = source(list(range(10)), batch_size=4, shuffle=True, seed=5)
    seen = [batch.tolist() for batch in data.epoch(1)]
    note = note_of(with_error_context(fit(step_that_fails_at(5), 0, data, epochs=2), data))
    assert note == f"In step 5: epoch 1, batch 1 (from 0), examples {', '.join(map(str, seen[1]))} of the data."


def test_without_indices_the_position_is_noted():
    assert note_of(with_error_context(fit(step_that_fails_at(2), 0, [1, 2]))) == "In step 2: epoch 0, batch 1 (from 0)."
    stream = source(iter([1, 2]))
    assert note_of(with_error_context(fit(step_that_fails_at(2), 0, stream), stream)) == "In step 2: epoch 0, batch 1 (from 0)."


def test_a_fetch_that_fails():
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            if index == 4:
                raise RuntimeError("cannot be read")
            return index

    data = source(Data(), batch_size=2)
    note = note_of(with_error_context(fit(step_that_fails_at(0), 0, data), data))
    assert note == "After step 2, before epoch 0, batch 2 (from 0), examples 4, 5 of the data."


def test_events_are_unchanged():
    def events():
        return fit(step_that_fails_at(0), 0, [1, 2, 3], epochs=2, due=cadence(log=2))

    assert list(with_error_context(events())) == list(events())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_example_indices_are_those_of_the_batches(micro_batches):
    tensors = TensorDataset(torch.arange(11))
    loader = DataLoader(tensors, batch_sampler=[[3, 1], [0], [9, 2, 4]])
    sources = [
        source(list(range(11)), batch_size=3, shuffle=True, micro_batches=micro_batches),
        source(list(range(11)), batch_size=3, drop_last=True, micro_batches=micro_batches),
        source(list(range(11)), shuffle=True, micro_batches=micro_batches),
        source(list(range(11)), batch_size=2, sampler=[5, 3, 1], micro_batches=micro_batches),
        source(tensors, batch_size=4, shuffle=True, micro_batches=micro_batches),
        source(loader, micro_batches=micro_batches),
    ]
    for each in sources:
        for epoch in (0, 2):
            for number, batch in enumerate(each.epoch(epoch)):
                parts = batch if micro_batches > 1 else [batch]
                parts = [part[0] if isinstance(part, list) else part for part in parts]
                flat = [int(item) for part in parts for item in torch.atleast_1d(torch.as_tensor(part))]
                assert each.example_indices(epoch, number) == flat
    assert source(range(3)).example_indices(0, 1) == [1]
    assert source(number for number in range(3)).example_indices(0, 1) is None


def test_long_batches_are_abbreviated():
    data = source(list(range(100)), batch_size=100)
    assert describe_batch(data, Position(0, 0)).endswith("62, 63 and 36 more of the data")
    assert loops.on_device(data, "meta").example_indices(0, 0) == list(range(100))
