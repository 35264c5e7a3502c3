import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fts
from fts import loops, steps, transforms as tx
from fts.errors import ArgumentError, NonFiniteError
from fts.loops import Position, RollbackPolicy, RolledBack, StepEnd, cadence, fit, source, with_error_context, with_rollback

NAN = float("nan")
BAD = 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def loss(model, batch):
    return F.mse_loss(model(batch), batch.sum(1, keepdim=True))


def batches(bad=()):
    made = torch.randn(10, 4, 3, generator=torch.Generator().manual_seed(1))
    for number in bad:
        made[number, 2, 1] = NAN
    return list(made)


def parts(raises="step"):
    net = network()
    optimizer = tx.adamw(0.1) if raises == "step" else tx.skip_nonfinite(tx.adamw(0.1), limit=1)
    step = steps.train_step(steps.module_loss(net, loss), optimizer)
    return steps.with_nonfinite_check(step) if raises == "step" else step, fts.TrainState.create(net, optimizer, seed=2)


def last_of(events):
    *_, last = events
    return last


def same(one, other):
    for name in ("params", "buffers"):
        left, right = getattr(one, name), getattr(other, name)
        assert all(torch.equal(left[key], right[key]) for key in right)
    assert int(one.step) == int(other.step)


@pytest.mark.parametrize("raises", ["step", "transform"])
def test_the_run_is_that_without_the_bad_batch(raises):
    """Bit for bit, with dropout and running statistics; also where the failed step had consumed its state."""
    step, state = parts(raises)
    good = [batch for number, batch in enumerate(batches()) if number != BAD]
    expected = last_of(fit(step, state, good)).state
    step, state = parts(raises)
    data = batches(bad=[BAD])
    events = list(with_rollback(lambda state, start: fit(step, state, data, start=start), state, RollbackPolicy(every=1)))
    (back,) = [event for event in events if isinstance(event, RolledBack)]
    assert back.step == 5 and back.counters.position == Position(0, BAD + 1)
    assert isinstance(back.error, NonFiniteError)
    assert [event.counters.step for event in events if isinstance(event, StepEnd)] == list(range(1, 10))
    same(events[-1].state, expected)


def test_what_was_trained_since_the_copy_is_lost_and_its_batches_are_passed():
    step, state = parts()
    kept = [batch for number, batch in enumerate(batches()) if number not in (3, 4, BAD)]
    expected = last_of(fit(step, state, kept)).state
    step, state = parts()
    data = batches(bad=[BAD])
    events = list(with_rollback(lambda state, start: fit(step, state, data, start=start), state, RollbackPolicy(every=3)))
    assert [event.counters.step for event in events if isinstance(event, StepEnd)] == [1, 2, 3, 4, 5, 4, 5, 6, 7]
    same(events[-1].state, expected)


def test_a_total_is_reached_over_epochs_and_two_faults_in_a_row():
    step, state = parts()
    data = batches(bad=[0, 8, 9])
    run = with_rollback(
        lambda state, start: fit(step, state, data, start=start, total_steps=12), state, RollbackPolicy(every=1, limit=6)
    )
    events = list(run)
    backs = [event.counters.position for event in events if isinstance(event, RolledBack)]
    assert backs == [Position(0, 1), Position(0, 9), Position(0, 10), Position(1, 1)]
    assert int(events[-1].state.step) == 12 and events[-1].reason == "total_steps"
    assert all(tensor.isfinite().all() for tensor in events[-1].state.params.values())


def test_beyond_the_limit_the_error_has_the_position_and_the_count():
    step, state = parts()
    data = source(
        TensorDataset(torch.cat(batches(bad=[2, 4, 6]))), batch_size=4, collate=lambda rows: torch.stack([r for (r,) in rows])
    )
    run = with_rollback(
        lambda state, start: with_error_context(fit(step, state, data, start=start), data),
        state,
        RollbackPolicy(every=1, limit=2),
    )
    with pytest.raises(NonFiniteError, match=r"In step 5 .*: 0\.weight \(") as caught:
        list(run)
    place, limit = caught.value.__notes__
    assert place == "In step 5: epoch 0, batch 6 (from 0), examples 24, 25, 26, 27 of the data."
    assert "rolled back 2 times" in limit


def test_from_a_checkpoint(tmp_path):
    step, state = parts()
    like = parts()[1]
    data = batches(bad=[BAD])

    def save(state, position):
        return loops.save_checkpoint(tmp_path / f"checkpoint-{int(state.step)}", state, position)

    def restore():
        return loops.load_checkpoint(loops.newest_checkpoint(tmp_path), like=like)[0]

    def run(state, start):
        return fit(step, state, data, start=start, due=cadence(save=2), save=save)

    events = list(with_rollback(run, state, RollbackPolicy(restore=restore)))
    assert [event.step for event in events if isinstance(event, RolledBack)] == [4]
    kept = [batch for number, batch in enumerate(batches()) if number not in (4, BAD)]
    step, state = parts()
    same(events[-1].state, last_of(fit(step, state, kept)).state)


def test_without_a_fault_nothing_changes():
    step, state = parts()
    expected = list(fit(step, state, batches(), epochs=2, due=cadence(log=3)))
    step, state = parts()
    found = list(with_rollback(lambda s, start: fit(step, s, batches(), start=start, epochs=2, due=cadence(log=3)), state))
    assert found == expected
    same(found[-1].state, expected[-1].state)


def test_other_errors_pass():
    def step(state, batch):
        raise KeyError

    with pytest.raises(KeyError):
        list(with_rollback(lambda state, start: fit(step, state, [1], start=start), 0))


def test_several_states_and_frozen_parameters():
    net = network()
    net[0].requires_grad_(False)
    optimizer = tx.sgd(0.1)
    pair = {"a": fts.TrainState.create(net, optimizer), "b": torch.ones(2), "n": 3}
    copy = loops.rollback.clone_state(pair)
    assert copy["a"].frozen["0.weight"] is pair["a"].frozen["0.weight"] and copy["n"] == 3
    pair["a"].params["4.weight"].zero_()
    pair["a"].step.add_(1)
    assert copy["a"].params["4.weight"].abs().sum() > 0 and int(copy["a"].step) == 0
    assert copy["b"] is not pair["b"]


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": True}, {"limit": -1}, {"limit": 1.5}])
def test_other_numbers_are_errors(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        with_rollback(lambda state, start: iter(()), 0, RollbackPolicy(**arguments))
    with pytest.raises(ArgumentError, match="lambda state, start"):
        with_rollback(fit(lambda state, batch: (state, {}), 0, [1]), 0)
