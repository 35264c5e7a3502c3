"""A step that is replayed is the step of the run, bit for bit."""

import attrs
import pytest
import torch
from torch import nn

import fts
from fts import loops, steps, transforms as tx
from fts.errors import ArgumentError, CheckpointError, NonFiniteError
from fts.loops import Position, StepEnd, cadence, replay
from fts.steps import MicroBatches
from tests.loops.checkpoint_files import flip_a_bit

ITEMS, BATCH, EVERY = 28, 4, 5  # 7 steps an epoch


class Rows(torch.utils.data.Dataset):
    """Rows with a random augmentation; the poisoned one is NaN."""

    def __init__(self, poisoned=None):
        self.rows = torch.randn(ITEMS, 6, generator=torch.Generator().manual_seed(1))
        if poisoned is not None:
            self.rows[poisoned, 2] = float("nan")

    def __len__(self):
        return ITEMS

    def __getitem__(self, index):
        return {"x": self.rows[index] + 0.01 * torch.randn(6), "y": self.rows[index].nan_to_num().sum()}


def net_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


def training(**options):
    net = net_of()
    optimizer = tx.chain(tx.clip_by_global_norm(1.0), tx.adamw(tx.cosine_schedule(1e-2, warmup_steps=3, total_steps=40)))
    step = steps.train_step(
        steps.module_loss(net, lambda model, batch: (model(batch["x"]).squeeze(-1) - batch["y"]).square().mean()),
        optimizer,
        **options,
    )
    return step, fts.TrainState.create(net, optimizer, seed=11)


def data_of(poisoned=None, **options):
    return loops.source(Rows(poisoned), batch_size=BATCH, shuffle=True, seed=5, **options)


def saver(root):
    return lambda state, position: loops.save_checkpoint(root / f"checkpoint-{int(state.step)}", state, position)


def run(root, step, state, data, total=20, **options):
    """Train with a checkpoint every five steps; the states after each step."""
    after = {}
    for event in loops.fit(step, state, data, total_steps=total, due=cadence(save=EVERY), save=saver(root), **options):
        if isinstance(event, StepEnd):
            after[event.counters.step] = loops.rollback.clone_state(event.state)
    return after


def same(left, right):
    return all(torch.equal(tensor, right.params[name]) for name, tensor in left.params.items())


@pytest.mark.parametrize("to_step", [6, 7, 8, 10])
def test_a_step_is_replayed_bit_for_bit(tmp_path, to_step):
    """Also over the end of the first epoch, which has 7 steps."""
    after = run(tmp_path, *training(), data_of())
    torch.manual_seed(99)  # another process has other generators
    step, state = training()
    kept = {name: tensor.clone() for name, tensor in state.params.items()}
    data = data_of()
    found = replay(step, state, data, tmp_path / "checkpoint-5", to_step)
    assert same(found.before, after[to_step - 1]) and same(found.after, after[to_step])
    assert found.step == to_step
    assert found.position == (Position(0, to_step - 1) if to_step <= 7 else Position(1, to_step - 8))
    assert found.examples == data.example_indices(*attrs.astuple(found.position))
    assert torch.equal(found.batch["y"], torch.stack([Rows()[index]["y"] for index in found.examples]))
    assert found.loss == float(found.metrics["loss"])
    assert (found.error, found.nonfinite, found.nonfinite_examples) == (None, {}, [])
    # the norm that the optimizer saw is that of the gradients that are shown
    assert float(fts.global_norm(found.gradients)) == pytest.approx(float(found.metrics["grad_norm"]), rel=1e-6)
    assert found.equal is (True if to_step == 10 else None)
    assert found.compared_with == (tmp_path / "checkpoint-10" if to_step == 10 else None)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.params.items())


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"engine": "func"}])
def test_other_steps(tmp_path, options):
    run(tmp_path, *training(**options), data_of())
    found = replay(*training(**options), data_of(), tmp_path / "checkpoint-5", 15)
    assert found.equal is True and found.gradients


def test_micro_batches_and_workers(tmp_path):
    run(tmp_path, *training(), data_of(micro_batches=2, workers=2))
    found = replay(*training(), data_of(micro_batches=2), tmp_path / "checkpoint-5", 10)
    assert found.equal is True
    assert isinstance(found.batch, MicroBatches) and len(found.examples) == 2 * BATCH


def test_a_compiled_step(tmp_path):
    def compiled():
        step, state = training()
        return steps.compile(step, backend="eager"), state

    run(tmp_path, *compiled(), data_of())
    found = replay(*compiled(), data_of(), tmp_path / "checkpoint-15", 20)
    assert found.equal is True and found.gradients


def test_tensors_that_differ_are_named(tmp_path):
    run(tmp_path, *training(), data_of())
    step, state = training()
    state = loops.load_checkpoint(tmp_path / "checkpoint-10", like=state)[0]
    params = dict(state.params)
    params["3.bias"] = params["3.bias"] + 1e-7
    loops.save_checkpoint(tmp_path / "checkpoint-10", state.replace(params=params), Position(1, 4))
    found = replay(step, state, data_of(), tmp_path / "checkpoint-5", 10)
    assert found.equal is False
    assert found.differences == ("3.bias", "position in the data")


def test_other_data_differ(tmp_path):
    run(tmp_path, *training(), data_of())
    changed = data_of().example_indices(1, 2)[0]
    found = replay(*training(), data_of(changed), tmp_path / "checkpoint-5", 10)
    assert found.equal is False and "0.weight" in found.differences


def test_a_nonfinite_batch_is_found_with_its_examples_and_parameters(tmp_path):
    # the item that comes second in the eighth step
    poisoned = data_of().example_indices(1, 0)[1]
    run(tmp_path, *training(), data_of(poisoned), total=8)
    # item `poisoned` was seen in the first epoch, too: begin from there
    first = next(batch for batch in range(7) if poisoned in data_of().example_indices(0, batch)) + 1
    step, state = training()
    loops.save_checkpoint(tmp_path / "checkpoint-0", state)
    found = replay(step, state, data_of(poisoned), tmp_path / "checkpoint-0", first)
    assert found.error is None and found.loss != found.loss
    assert set(found.nonfinite) == {"batch", "gradients", "after"}  # and not before
    assert list(found.nonfinite["batch"]) == ["x"] and found.nonfinite["batch"]["x"].nan == 1
    assert set(found.nonfinite["gradients"]) == set(state.params)
    assert found.nonfinite_examples == [poisoned] and poisoned in found.examples
    later = replay(step, state, data_of(poisoned), tmp_path / "checkpoint-0", first + 1)
    assert "batch" not in later.nonfinite and set(later.nonfinite["before"]) == set(state.params)


def test_nonfinite_examples_of_micro_batches(tmp_path):
    poisoned = data_of().example_indices(0, 1)[2]
    step, state = training()
    loops.save_checkpoint(tmp_path / "checkpoint-0", state)
    found = replay(step, state, data_of(poisoned, micro_batches=2), tmp_path / "checkpoint-0", 1)
    assert found.nonfinite_examples == [poisoned]
    assert list(found.nonfinite["batch"]) == ["1.x"]


def test_nan_equals_nan_bit_for_bit(tmp_path):
    run(tmp_path, *training(), data_of(poisoned=4))
    found = replay(*training(), data_of(poisoned=4), tmp_path / "checkpoint-15", 20)
    assert set(found.nonfinite["after"]) and found.equal is True


@pytest.mark.parametrize("kind", ["gradients", "transform"])
def test_a_step_that_raises_is_shown(tmp_path, kind):
    poisoned = data_of().example_indices(0, 2)[0]
    step, state = training()
    if kind == "gradients":
        step = steps.with_nonfinite_check(step)
    else:
        transform = tx.skip_nonfinite(step.transform, limit=1)
        step, state = attrs.evolve(step, transform=transform), fts.TrainState.create(net_of(), transform, seed=11)
    loops.save_checkpoint(tmp_path / "checkpoint-0", state)
    found = replay(step, state, data_of(poisoned), tmp_path / "checkpoint-0", 3)
    assert isinstance(found.error, NonFiniteError)
    assert found.after is None and found.compared_with is None
    assert set(found.nonfinite) == {"batch", "gradients"} and found.nonfinite_examples == [poisoned]
    assert found.loss != found.loss
    with pytest.raises(NonFiniteError) as caught:  # an earlier step is no part of what is asked for
        replay(step, state, data_of(poisoned), tmp_path / "checkpoint-0", 5)
    assert any(note.startswith("In step 3: epoch 0, batch 2") for note in caught.value.__notes__)


def test_a_plain_function_has_no_gradients_to_show(tmp_path):
    inner, _ = training()

    def step(state, batch):
        return inner(state, batch)

    run(tmp_path, step, training()[1], data_of())
    found = replay(step, training()[1], data_of(), tmp_path / "checkpoint-5", 10)
    assert found.gradients is None and found.equal is True and found.loss == float(found.metrics["loss"])


def test_a_step_that_writes_into_its_state_keeps_the_state_before(tmp_path):
    step, state = training(donate=True)
    run(tmp_path, step, state, data_of())
    found = replay(training(donate=True)[0], training()[1], data_of(), tmp_path / "checkpoint-5", 10)
    assert found.equal is True
    assert not same(found.before, found.after)


def test_data_that_fit_would_take(tmp_path):
    batches = [{"x": torch.randn(4, 6), "y": torch.randn(4)} for _ in range(3)]
    run(tmp_path, *training(), batches)
    found = replay(*training(), batches, tmp_path / "checkpoint-5", 10)
    assert found.equal is True and found.position == Position(3, 0)


def test_a_corrupt_checkpoint_of_the_step_is_not_compared(tmp_path, caplog):
    run(tmp_path, *training(), data_of())
    flip_a_bit(tmp_path / "checkpoint-10")
    found = replay(*training(), data_of(), tmp_path / "checkpoint-5", 10)
    assert found.equal is None and "checkpoint-10 is not complete" in caplog.text


@pytest.mark.parametrize("to_step", [5, 3, 0, True, 6.5, None])
def test_a_step_that_is_not_after_the_checkpoint(tmp_path, to_step):
    run(tmp_path, *training(), data_of(), total=5)
    with pytest.raises(ArgumentError, match="which was written after step 5"):
        replay(*training(), data_of(), tmp_path / "checkpoint-5", to_step)


def test_a_corrupt_checkpoint(tmp_path):
    run(tmp_path, *training(), data_of(), total=5)
    flip_a_bit(tmp_path / "checkpoint-5")
    with pytest.raises(CheckpointError, match="has changed"):
        replay(*training(), data_of(), tmp_path / "checkpoint-5", 6)
